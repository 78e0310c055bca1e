"""What went wrong with the Hugging Face Hub, in words that say what to do."""

import os
from pathlib import Path


def explain(error: Exception, name: str, kind: str, key: str) -> Exception:
    """Return the error to show for `error`, met while loading the `kind` (model, dataset) `name` named by config `key`.

    Looks through the chain of causes for an HTTP status, since transformers and datasets wrap the hub's errors.
    """
    here = Path(name).expanduser()
    if (here.is_absolute() or name.startswith(".") or name.count("/") > 1) and not here.exists():
        return FileNotFoundError(
            f"{key}={name}: no such folder; expected one with a {kind} in it, or a hub id (owner/name)"
        )
    statuses, texts, cause = [], [], error
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        cause = todo.pop()  # type: ignore[assignment]
        if cause is None or id(cause) in seen:
            continue
        seen.add(id(cause))
        texts.append(f"{type(cause).__name__}: {cause}")
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status:
            statuses.append(int(status))
        todo += [cause.__cause__, cause.__context__]
    text = " ".join(texts)
    offline = os.environ.get("HF_HUB_OFFLINE") or "offline" in text.lower()
    local = f"A local folder works too: {key}=FOLDER"
    what = f"{key}={name}: cannot load this {kind} from the hub"
    if "trust_remote_code" in text:
        return ValueError(
            f"{key}={name}: this {kind} brings code of its own, which would run on this machine. Read it; then "
            "model.trust_remote_code=true allows it"
        )
    if 401 in statuses or 403 in statuses or (not statuses and "GatedRepo" in text):
        status = next((s for s in statuses if s in (401, 403)), 403)
        return PermissionError(
            f"{what} (HTTP {status}). It is private, gated or not there. Accept "
            f"its licence on the repository's page if it has one, and set HF_TOKEN to a token that may read it. {local}"
        )
    if 404 in statuses or "RepositoryNotFound" in text or "DatasetNotFound" in text:
        there = " (HTTP 404)" if 404 in statuses else ""  # datasets does not say what the hub answered
        return FileNotFoundError(
            f"{what}: no such repository, file or split{there}, or it is private or gated: accept its licence on "
            f"the repository's page if it has one, and set HF_TOKEN to a token that may read it. {local}"
        )
    words = ("Connect", "Timeout", "resolve", "Max retries", "LocalEntryNotFound", "couldn't connect", "unreachable")
    if offline or any(w in text for w in words):
        return ConnectionError(
            f"{what}: no network, and it is not in the local cache. If it is gated, its licence must be accepted and "
            f"HF_TOKEN set before the first download. {local}"
        )
    return ValueError(f"{what}: {error}")
