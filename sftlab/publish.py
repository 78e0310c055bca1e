"""python -m sftlab.publish run=DIR repo_id=user/name: a run's model on the Hugging Face Hub, with a card."""

from omegaconf import DictConfig

from sftlab.config import start


def publish(cfg: DictConfig) -> None:
    """Write the folder, and upload it unless this is a dry run."""
    from sftlab.publishing import publication

    publication.publish(cfg)


def main() -> None:
    """Entry point."""
    start.main(publish, "publish")


if __name__ == "__main__":
    main()
