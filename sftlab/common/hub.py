"""What went wrong with the Hugging Face Hub, in words that say what to do; and what its libraries may print."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

LFS = b"version https://git-lfs"
POINTER = "is a pointer of Git LFS and not the file itself. Fetch it: git lfs pull in that folder, or hf download"


def is_pointer(file: Path) -> bool:
    """Return whether a file is what git leaves in the place of a large one."""
    if not file.is_file() or file.stat().st_size > 1024:
        return False
    with file.open("rb") as opened:
        return opened.read(len(LFS)) == LFS


def explain(error: Exception, name: str, kind: str, key: str) -> Exception:
    """Return the error to show for `error`, met while loading the `kind` (model, dataset) `name` named by config `key`.

    transformers and datasets wrap the hub's errors, so the whole chain of causes is looked at.
    """
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import errors

    here = Path(name).expanduser()
    if (here.is_absolute() or name.startswith(".") or name.count("/") > 1) and not here.exists():
        return FileNotFoundError(
            f"{key}={name}: no such folder; expected one with a {kind} in it, or a hub id (owner/name)"
        )
    chain = list(causes(error))
    statuses = [int(s) for e in chain if (s := getattr(getattr(e, "response", None), "status_code", None))]
    local = f"A local folder works too: {key}=FOLDER"
    what = f"{key}={name}: cannot load this {kind} from the hub"
    if any("trust_remote_code" in str(e) for e in chain):  # transformers raises a plain ValueError
        return ValueError(
            f"{key}={name}: this {kind} brings code of its own, which would run on this machine. Read it; then "
            f"{'trust' if key == 'run' else 'model.trust_remote_code'}=true allows it"
        )
    if here.is_dir():
        if pointer := next(filter(is_pointer, sorted(here.iterdir())), None):
            return ValueError(f"{key}={name}: {pointer.name} {POINTER}")
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return ValueError(f"{key}={name}: this folder holds no {kind} that can be read: {why}")
    refused = next((s for s in statuses if s in (401, 403)), None)
    if refused or (not statuses and any(isinstance(e, errors.GatedRepoError) for e in chain)):
        return PermissionError(
            f"{what} (HTTP {refused or 403}). It is private, gated or not there. Accept "
            f"its licence on the repository's page if it has one, and set HF_TOKEN to a token that may read it. {local}"
        )
    absent = (errors.RepositoryNotFoundError, errors.RemoteEntryNotFoundError, errors.RevisionNotFoundError)
    if 404 in statuses or any(isinstance(e, (*absent, DatasetNotFoundError)) for e in chain):
        there = " (HTTP 404)" if 404 in statuses else ""  # datasets does not say what the hub answered
        return FileNotFoundError(
            f"{what}: no such repository, file or split{there}, or it is private or gated: accept its licence on "
            f"the repository's page if it has one, and set HF_TOKEN to a token that may read it. {local}"
        )
    unreachable = (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)
    # The hub's client has changed its HTTP library twice, and each has a TransportError of its own.
    transport = any(base.__name__ == "TransportError" for e in chain for base in type(e).__mro__)
    if os.environ.get("HF_HUB_OFFLINE") or transport or any(isinstance(e, unreachable) for e in chain):
        return ConnectionError(
            f"{what}: no network, and it is not in the local cache. If it is gated, its licence must be accepted and "
            f"HF_TOKEN set before the first download. {local}"
        )
    return ValueError(f"{what}: {error}")


def quiet_transformers(level: int = logging.WARNING) -> None:
    """Log messages of at least `level`; turn off transformers' progress bars."""
    import transformers

    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=level)
    transformers.utils.logging.disable_progress_bar()


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and everything that led to it, each once."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        cause = todo.pop()
        if cause is not None and id(cause) not in seen:
            seen.add(id(cause))
            yield cause
            todo += [cause.__cause__, cause.__context__]
