"""Whether all ranks run the same code: a node with an older copy would train on another model, or hang."""

import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

LIBRARIES = ("torch", "transformers")


def code_version() -> str:
    """Return what names the code that this process runs: a hash of sftlab's sources, and the versions of libraries."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\n".encode() + file.read_bytes())
    return f"sftlab {digest.hexdigest()[:12]}, " + ", ".join(f"{name} {version(name)}" for name in LIBRARIES)


def require_same_code(places: Sequence[tuple[str, str]]) -> None:
    """Raise ValueError if a rank runs other code than rank 0; `places` are each rank's (host, code version)."""
    _, ours = places[0]
    others = [(rank, host, code) for rank, (host, code) in enumerate(places) if code != ours]
    if others:
        rank, host, code = others[0]
        more = f", and {len(others) - 1} more ranks" if len(others) > 1 else ""
        raise ValueError(
            f"rank {rank} on {host} runs {code}{more}; rank 0 on {places[0][0]} runs {ours}. Install the same version "
            "on every node, or start all ranks from one folder that they share (launcher=slurm makes one)"
        )
