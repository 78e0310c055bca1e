"""Upload to the Hugging Face Hub in one commit, all files or none. Errors say what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REMEDY = {
    401: "there is no valid token: log in with `hf auth login`, or set HF_TOKEN to one that may write",
    403: "the token may not do this: give it write access to {repo_id}, or publish under a name of your own",
    404: "there is no such repository or user for this token: check repo_id=, and that the token may see it",
    409: "it was changed or created while this ran: look at it, then publish again with update=true",
    412: "it changed while this ran: look at it, then publish again with update=true",
    413: "a file is larger than the hub takes",
    429: "the hub asks for a pause: wait some minutes, then publish again",
}


class PublishError(OSError):
    """The upload failed. The message says what the hub holds now and what to do."""


def upload(folder: Path, repo_id: str, *, private: bool, update: bool, message: str, token: str | None = None) -> str:
    """Upload a folder as one commit; return the repository's address.

    A repository that this call created but could not fill is deleted again. An existing one is changed only with
    `update`, by one commit. Raises: PublishError.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    made, parent = claim(api, repo_id, private=private, update=update)
    try:
        with explained(repo_id, "the commit"):
            api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=message,
                parent_commit=parent,
                # an earlier version may have weights that this one does not replace, such as shards
                delete_patterns=["*.safetensors", "*.safetensors.index.json"],
            )
    except BaseException as error:
        if not made:
            if isinstance(error, PublishError):
                raise PublishError(f"{error}. {repo_id} is unchanged: a commit is all or nothing") from error
            raise
        left = take_away(api, repo_id)
        if isinstance(error, PublishError):
            raise PublishError(f"{error}. {left}") from error
        raise
    return f"{api.endpoint}/{repo_id}"


def claim(api: Any, repo_id: str, *, private: bool, update: bool) -> tuple[bool, str | None]:
    """Create or find the repository; return whether it was created, and the last commit of an existing one.

    Raises: PublishError if it exists and `update` is not set, or if it is public and `private` is set.
    """
    from huggingface_hub.errors import HfHubHTTPError

    try:
        with explained(repo_id, "making the repository"):
            api.create_repo(repo_id, private=private)
        return True, None
    except PublishError as error:
        cause = error.__cause__
        if not isinstance(cause, HfHubHTTPError) or status_of(cause) != 409:
            raise PublishError(f"{error}. Nothing was published") from cause
    if not update:
        raise PublishError(
            f"repo_id={repo_id} exists already (HTTP 409); nothing was published. update=true adds this as its next "
            "version, or give another repo_id="
        )
    with explained(repo_id, "looking at the repository"):
        found = api.repo_info(repo_id)
    if private and not found.private:
        raise PublishError(
            f"repo_id={repo_id} is public, and this would be too; nothing was published. private=false allows "
            "that; or give another repo_id="
        )
    return False, found.sha


def take_away(api: Any, repo_id: str) -> str:
    """Delete the empty repository that was just created; return what is left, for a message."""
    try:
        api.delete_repo(repo_id)
    except Exception as error:
        return f"The empty repository {repo_id} could not be deleted ({type(error).__name__}): delete it by hand"
    return "Nothing was published, and the repository made for it is deleted"


@contextmanager
def explained(repo_id: str, doing: str) -> Iterator[None]:
    """Turn an error of the hub into a PublishError that says the status and what to do."""
    try:
        yield
    except Exception as error:
        status = status_of(error)
        if status:
            trouble = "the hub has trouble of its own: see status.huggingface.co, and publish again later"
            remedy = REMEDY.get(status, trouble if status >= 500 else str(error)).format(repo_id=repo_id)
            raise PublishError(f"{doing}: the hub answers HTTP {status} to repo_id={repo_id}: {remedy}") from error
        names = {type(e).__name__ for e in chain(error)}
        if any(word in name for name in names for word in ("Connect", "Timeout", "Offline", "Network", "Protocol")):
            text = f"{doing}: the hub cannot be reached ({error}); HF_HUB_OFFLINE must not be set. See dry_run=true"
            raise PublishError(text) from error
        raise


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of an error or of one of its causes; None if there is none."""
    for e in chain(error):
        status = getattr(getattr(e, "response", None), "status_code", None)
        if status:
            return int(status)
    return None


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
