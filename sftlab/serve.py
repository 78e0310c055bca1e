"""python -m sftlab.serve run=DIR: an OpenAI-compatible server for a trained model, on loopback."""

from omegaconf import DictConfig

from sftlab.config import start


def serve(cfg: DictConfig) -> None:
    """Serve until interrupted. Exits with the engine's code where that ends by itself."""
    from sftlab.serving import session

    session.serve(cfg)


def main() -> None:
    """Entry point."""
    start.main(serve, "serve")


if __name__ == "__main__":
    main()
