"""python -m sftlab.preview: the data of a run as the model will see it. Takes the overrides of train."""

from omegaconf import DictConfig

from sftlab.config import start
from sftlab.config.binding import check, resolved

OWN = ("rows", "row", "step", "output", "picture")


def preview(cfg: DictConfig) -> None:
    """Show the data of one composed config."""
    config = resolved(cfg)
    own = {key: config.pop(key) for key in OWN}
    check(config)
    from sftlab.training.preview import show_preview

    show_preview(config, own)


def main() -> None:
    """Entry point."""
    start.main(preview, "preview")


if __name__ == "__main__":
    main()
