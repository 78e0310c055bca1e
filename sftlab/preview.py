"""python -m sftlab.preview: the data of a run as the model will see it. Takes the overrides of train."""

from omegaconf import DictConfig, OmegaConf

from sftlab.config import start

OWN = ("rows", "row", "step", "output", "picture")


def preview(cfg: DictConfig) -> None:
    """Show the data of one composed config."""
    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(config, dict)
    own = {key: config.pop(key) for key in OWN}
    from sftlab.training.preview import show_preview

    show_preview({str(k): v for k, v in config.items()}, own)


def main() -> None:
    """Entry point."""
    start.main(preview, "preview")


if __name__ == "__main__":
    main()
