"""Search a folder for what must not be published: optimiser state, tokens and other secrets, absolute paths."""

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sftlab.common.files import plain_files
from sftlab.common.secrets import patterns_in
from sftlab.publishing.paths import ABSOLUTE

STATE = re.compile(
    r"(^|/)(optimizer|optim|scheduler|rng_state|scaler|trainer_state|training_args|global_step|step_\d+|checkpoints?)"
    r"([._/-]|$)|\.(distcp|pt|pth|ckpt|pkl|pickle)$|(^|/)\.metadata$",
    re.IGNORECASE,
)
STATE_TENSOR = re.compile(r"exp_avg|optimizer|optim\.|momentum_buffer|(^|\.)state\.")
SECRET_NAME = re.compile(
    r"(^|/)(\.env[^/]*|\.netrc|\.git-credentials|credentials|id_(rsa|ed25519|ecdsa)|token|.*\.pem)$"
)
TEXT = {".md", ".json", ".jsonl", ".yaml", ".yml", ".txt", ".svg", ".py", ".toml", ".jinja", ""}
# Not searched for paths: these texts are learned or inherited, and a vocabulary has tokens such as /usr/bin.
LEARNED = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "added_tokens.json")
LARGE_BYTES = 64 * 2**20  # larger files are not read; of .safetensors only the header is


def refuse(folder: Path, token: str | None = None, replaced: Collection[str] = ()) -> None:
    """Raise ValueError that names every file in `folder` that must not be published, and why.

    `token` is the user's. `replaced` are values in JSON that are written anew before anything is published.
    """
    found = [f"  {name}: {why}" for path, name in files(folder) for why in reasons(path, name, token, replaced)]
    if found:
        raise ValueError(
            f"{folder} is not fit to be published; nothing was uploaded\n"
            + "\n".join(found)
            + "\nRemove these from the folder (and revoke the secret, if it is one), then publish again"
        )


def files(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield every file under a folder with its name relative to it, in order. Raises: LinkRefused for a link."""
    for name in plain_files(folder):
        yield folder / name, name


def reasons(path: Path, name: str, token: str | None, replaced: Collection[str] = ()) -> Iterator[str]:
    """Yield why a file must not be published."""
    if STATE.search(name):
        yield "optimiser state or a checkpoint, which is for resuming; only model/ is published"
    if SECRET_NAME.search(name):
        yield "a file in which secrets are kept"
    if path.suffix == ".safetensors":
        names, metadata = header(path)
        state = sorted(key for key in names if STATE_TENSOR.search(key))
        if state:
            yield f"optimiser state: it holds {state[0]}" + (f" and {len(state) - 1} more such" if state[1:] else "")
        content = json.dumps(metadata).encode()
    else:
        content = path.read_bytes() if path.stat().st_size <= LARGE_BYTES else b""
    if token and token.encode() in content:
        yield "your own Hugging Face token"
    learned = Path(name).name in LEARNED or path.suffix not in TEXT
    yield from patterns_in(content, loose=not learned)
    if path.suffix in TEXT and Path(name).name not in LEARNED:
        paths = absolute_paths(content, path.suffix == ".json", replaced)
        if paths:
            yield f"an absolute path of this machine: {paths[0]}" + (f" and {len(paths) - 1} more" if paths[1:] else "")


def header(path: Path) -> tuple[list[str], dict[str, str]]:
    """Return the names of the tensors and the metadata of a safetensors file. Raises: ValueError if it is not one."""
    try:
        with safe_open(path, framework="numpy") as file:
            return list(file.keys()), file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or half of one ({error})") from None


def absolute_paths(content: bytes, is_json: bool, replaced: Collection[str] = ()) -> list[str]:
    """Return the absolute paths in a text. In JSON only the values are searched, without chat templates."""
    text = content.decode(errors="replace")
    if is_json:
        text = "\n".join(value for value in strings(json.loads(text)) if value not in replaced)
    return sorted({found.group() for found in ABSOLUTE.finditer(text)})


def strings(node: Any) -> Iterator[str]:
    """Yield every text in a tree, except those under `chat_template`."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key != "chat_template":
                yield from strings(value)
    elif isinstance(node, list):
        for value in node:
            yield from strings(value)
    elif isinstance(node, str):
        yield node
