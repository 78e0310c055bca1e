"""Publish a model from start to end: write its folder, refuse what must not be in it, upload unless dry_run."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from sftlab.assets import SCHEME, locate
from sftlab.common.files import read_json
from sftlab.common.words import plain, size
from sftlab.inference.trained_model import TrainedModel, resolve
from sftlab.publishing.licence import licence_of
from sftlab.publishing.stage import stage
from sftlab.publishing.upload import upload

BLANK = "..."


def publish(cfg: Any) -> None:
    """Write the folder, and upload it unless this is a dry run."""
    check_repo_id(cfg.repo_id)
    trained = resolve(cfg.run, cfg.trust)
    if trained.run_dir is None or trained.config is None:
        raise ValueError(
            f"run={cfg.run} names a model without the run that made it, so there is nothing to write in its card: "
            "give the run's directory"
        )
    model = trained.config["model"]
    base, random = str(model["name_or_path"]), model["init"] == "random"
    licence = licence_of(base, cfg.license, random, network=not cfg.dry_run)
    prompt = cfg.prompt or example_prompt(trained)
    token = get_token()
    folder, left = stage(trained.run_dir, Path(trained.model), cfg.repo_id, trained.config, prompt, licence, token)
    if cfg.dry_run:
        done = f"dry run: nothing was uploaded. {folder} holds what would be uploaded to {cfg.repo_id}"
    else:
        message = cfg.message or default_message(trained)
        url = upload(folder, cfg.repo_id, private=cfg.private, update=bool(cfg["update"]), message=message, token=token)
        done = f"published{' privately' if cfg.private else ''}: {url}"
    listing(folder)
    if left:
        print(plain(f"left here, because no model consists of such files: {', '.join(left)}"))
    if licence.id is None:
        print("the licence is not known: the card says so; license= states one")
    print(done)


def check_repo_id(repo_id: str | None) -> None:
    """Raise ValueError if this cannot be the name of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    if not repo_id or repo_id.count("/") != 1:
        raise ValueError(f"repo_id={repo_id}: expected user/name, the name of a repository on the hub")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id={repo_id}: {error}") from None


def example_prompt(trained: TrainedModel) -> str:
    """Return a prompt in the run's format: a question of the demo's data, else one with blank fields.

    Rows of other data are never shown, because they may be private.
    """
    if trained.format is None:
        return BLANK
    from sftlab.training.build import component

    format = component("data.format", trained.format)
    assert trained.config is not None
    val_path = str(trained.config["data"].get("val_path") or "")
    if val_path.startswith(SCHEME):
        with open(locate(val_path), encoding="utf-8") as file:
            return str(format.prompt_text(format.row(json.loads(file.readline()))))
    try:
        return str(format.prompt_text(format.row(Blank())))
    except ValueError:
        return BLANK  # some formats, such as chat, cannot make a prompt from blanks


class Blank(Mapping[str, Any]):
    """A row whose fields are all blank."""

    def __getitem__(self, key: str) -> str:
        return BLANK

    def __contains__(self, key: object) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def listing(folder: Path) -> None:
    """Print what the folder holds, with sizes."""
    found = [(p.relative_to(folder).as_posix(), p.stat().st_size) for p in sorted(folder.rglob("*")) if p.is_file()]
    print(f"{folder}: {len(found)} files, {size(sum(s for _, s in found))}")
    for name, num_bytes in found:
        print(f"  {size(num_bytes):>10}  {plain(name)}")


def default_message(trained: TrainedModel) -> str:
    """Return the commit message: the run's name, its steps and its loss."""
    assert trained.run_dir is not None and trained.config is not None
    file = trained.run_dir / "summary.json"
    summary = read_json(file)
    score = f", loss {float(summary['score']):.4f}" if "score" in summary else ""
    return f"{trained.config['name']}: {summary.get('steps', '?')} steps{score}"
