"""Errors of the Hugging Face Hub become ones that say what to do, by what lies in their chain of causes."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from sftlab.common.hub import explain


class Http(Exception):
    def __init__(self, status: int, text: str = "refused") -> None:
        super().__init__(text)
        self.response = SimpleNamespace(status_code=status)


class GatedRepoError(Exception):
    pass


class RepositoryNotFoundError(Exception):
    pass


class DatasetNotFoundError(Exception):
    pass


class LocalEntryNotFoundError(Exception):
    pass


def wrapped(error: Exception, *, by_context: bool = False) -> Exception:
    """Return an error as transformers and datasets pass it on: two others around it."""
    middle, outer = OSError("cannot load"), ValueError("nothing here")
    if by_context:
        middle.__context__, outer.__context__ = error, middle
    else:
        middle.__cause__, outer.__cause__ = error, middle
    return outer


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


LOCAL = "A local folder works too: data.path=FOLDER"


@pytest.mark.parametrize("by_context", [False, True])
@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (Http(401), PermissionError, ["(HTTP 401)", "private, gated or not there", "HF_TOKEN", LOCAL]),
        (Http(403), PermissionError, ["(HTTP 403)", "Accept its licence", LOCAL]),
        (GatedRepoError("ask"), PermissionError, ["(HTTP 403)", LOCAL]),
        (Http(404), FileNotFoundError, ["no such repository, file or split (HTTP 404), or it is private", LOCAL]),
        (RepositoryNotFoundError("x"), FileNotFoundError, ["no such repository, file or split, or it is", LOCAL]),
        (DatasetNotFoundError("x"), FileNotFoundError, ["no such repository, file or split, or it is", LOCAL]),
        (ConnectionResetError("gone"), ConnectionError, ["no network", "not in the local cache", LOCAL]),
        (TimeoutError("late"), ConnectionError, ["no network", LOCAL]),
        (OSError("could not resolve host"), ConnectionError, ["no network", LOCAL]),
        (OSError("Max retries exceeded"), ConnectionError, ["no network", LOCAL]),
        (LocalEntryNotFoundError("x"), ConnectionError, ["no network", LOCAL]),
        (OSError("we couldn't connect to it"), ConnectionError, ["no network", LOCAL]),
        (OSError("network is unreachable"), ConnectionError, ["no network", LOCAL]),
        (OSError("Offline mode is on"), ConnectionError, ["no network", LOCAL]),
        (ValueError("pass trust_remote_code=True"), ValueError, ["brings code of its own", "trust_remote_code=true"]),
        (Http(500), ValueError, ["cannot load this dataset from the hub: nothing here"]),
        (KeyError("x"), ValueError, ["cannot load this dataset from the hub: nothing here"]),
    ],
    ids=lambda value: type(value).__name__ + str(value)[:24] if isinstance(value, Exception) else "",
)
def test_what_went_wrong_and_what_to_do(
    error: Exception, kind: type[Exception], words: list[str], by_context: bool
) -> None:
    found = explain(wrapped(error, by_context=by_context), "owner/name", "dataset", "data.path")
    assert type(found) is kind
    assert str(found).startswith("data.path=owner/name: ")
    for text in words:
        assert text in str(found)


def test_a_status_says_more_than_a_name() -> None:
    gated = GatedRepoError("ask")
    gated.__cause__ = Http(404)
    assert isinstance(explain(gated, "owner/name", "model", "model.name_or_path"), FileNotFoundError)
    refused = Http(500)
    refused.__cause__ = Http(401)
    found = explain(refused, "owner/name", "model", "model.name_or_path")
    assert isinstance(found, PermissionError) and "(HTTP 401)" in str(found)


def test_offline_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert isinstance(explain(KeyError("x"), "owner/name", "model", "model.name_or_path"), ConnectionError)


def test_errors_in_a_circle_end() -> None:
    first, second = ValueError("a"), Http(403)
    first.__cause__, second.__cause__ = second, first
    assert isinstance(explain(first, "owner/name", "model", "run"), PermissionError)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "../nowhere", "a/b/c", "~/nowhere"])
def test_what_can_only_be_a_folder_is_a_missing_folder(name: str) -> None:
    found = explain(Http(404), name, "model", "model.name_or_path")
    assert isinstance(found, FileNotFoundError)
    assert str(found) == (
        f"model.name_or_path={name}: no such folder; expected one with a model in it, or a hub id (owner/name)"
    )


def test_a_folder_that_is_there_is_not_called_missing(tmp_path: Path) -> None:
    found = explain(KeyError("weights"), str(tmp_path), "model", "model.name_or_path")
    assert type(found) is ValueError and "no such folder" not in str(found)
    assert "no such folder" not in str(explain(Http(500), "owner/name", "model", "model.name_or_path"))
