"""sftlab: supervised fine-tuning of Hugging Face causal language models, and sweeps of it that end in an answer.

Five names are the Python interface (docs/api.md): `compose`, `run`, `load`, `Answerer`, `sweep`. Each is imported when
it is first used, so that `import sftlab` takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sftlab.config.composing import compose as compose
    from sftlab.inference.answerer import Answerer as Answerer
    from sftlab.inference.answerer import load as load
    from sftlab.training.run import run as run

__version__ = "0.1.0"
__all__ = ["Answerer", "compose", "load", "run", "sweep"]

PLACES = {
    "compose": "sftlab.config.composing",
    "run": "sftlab.training.run",
    "load": "sftlab.inference.answerer",
    "Answerer": "sftlab.inference.answerer",
}


def __getattr__(name: str) -> Any:
    """Return one of the five names. `sweep` is the command's module, which can be called."""
    if name == "sweep":
        return import_module("sftlab.sweep")
    if name not in PLACES:
        raise AttributeError(f"module 'sftlab' has no attribute {name!r}; its names are {', '.join(__all__)}")
    return getattr(import_module(PLACES[name]), name)


def __dir__() -> list[str]:
    """Return the names that are offered."""
    return [*__all__, "__version__"]
