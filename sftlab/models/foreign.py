"""What a model's folder brings that is not its own: files that lie elsewhere, and code.

A folder may be somebody else's. What it takes in from elsewhere, maybe a private file of the user's, would become part
of the trained model and be published with it; and transformers runs code that a folder names, if it may.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sftlab.common.files import LinkRefused, refuse_deflated

VOCABULARIES = ("vocab", "merges", "gguf_file", "init_inputs")  # of a tokenizer's config; a text in these is a path
MOST_LAYERS = 10_000  # a config of 10 million layers took all memory before its weights were read; Llama 405B has 126
GENERATE = "custom_generate/generate.py"  # transformers replaces `generate` by what is in it


def refuse_foreign_parts(folder: Path) -> None:
    """Raise ValueError if a model's folder takes in a file that lies elsewhere, maybe a private one.

    By a link, by an index of weights, or by a tokenizer's config. Also if it would take far more memory than its files.
    """
    refuse_links_out(folder)
    refuse_endless(folder / "config.json")
    for weights in (*folder.glob("*.bin"), *folder.glob("*.pt")):
        with weights.open("rb") as file:
            refuse_deflated(file, str(weights))
    refuse_vocabulary_elsewhere(folder / "tokenizer_config.json")
    for index in (*folder.glob("*.safetensors.index.json"), *folder.glob("*.bin.index.json")):
        try:
            found = json.loads(index.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{index} is no index of weights ({error})") from None
        names = found.get("weight_map") if isinstance(found, dict) else None
        if not isinstance(names, dict):
            raise ValueError(f"{index} is no index of weights")
        for name in map(str, names.values()):
            if Path(name).name != name or "\\" in name:
                raise ValueError(f"{index} names {name!r}: the files of a model lie in its own folder")


def refuse_links_out(folder: Path) -> None:
    """Raise LinkRefused if a file in a model's folder is a link that leads out of it, maybe to a private file.

    What it holds would become part of this run's model, such as its chat template. The hub's cache is a folder of links
    to files beside it.
    """
    inside = [folder.resolve()]
    if folder.parent.name == "snapshots":
        inside.append(folder.resolve().parent.parent / "blobs")
    more = folder / "additional_chat_templates"
    for path in (*folder.glob("*"), *more.glob("*")):
        elsewhere = path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in inside)
        if elsewhere and (path == more or not path.is_dir()):
            raise LinkRefused(
                f"{path} is a link to {os.readlink(path)}, out of the model's folder: put the file itself there"
            )


def refuse_vocabulary_elsewhere(file: Path) -> None:
    """Raise ValueError if a tokenizer's config names files: transformers would read them, wherever they lie.

    Each line of a private file would become a token, and be saved with the trained model.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return  # transformers says what is wrong with it
    for key in VOCABULARIES if isinstance(found, dict) else ():
        value = found.get(key)
        if any(
            isinstance(part, str) for part in (value if key == "init_inputs" and isinstance(value, list) else [value])
        ):
            raise ValueError(f"{file}: {key}={value!r:.100} names a file: a vocabulary lies in the model's own folder")


def refuse_endless(file: Path) -> None:
    """Raise ValueError if a model's config, or a config inside it, asks for more than MOST_LAYERS layers."""
    try:
        todo = [json.loads(file.read_text(encoding="utf-8"))] if file.is_file() else []
    except (OSError, ValueError, RecursionError):
        return  # transformers says what is wrong with it
    while todo:
        here = todo.pop()
        for key, value in here.items() if isinstance(here, dict) else ():
            if "layer" in key and isinstance(value, int | float) and value > MOST_LAYERS:
                raise ValueError(f"{file}: {key}={value:g} is no model: expected at most {MOST_LAYERS:,} layers")
            todo.append(value)


def own_code(folder: Path) -> list[str]:
    """Return the classes that a model's JSON files name by `auto_map`, kernels by their repository, and GENERATE."""
    found: dict[str, None] = {}
    if (folder / GENERATE).exists():
        found[GENERATE] = None
    for file in ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json"):
        if (folder / file).is_file():
            try:
                node = json.loads((folder / file).read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError):
                continue  # transformers says what is wrong with it
            found |= dict.fromkeys(classes_in(node))
    return list(found)


def classes_in(node: Any) -> Iterator[str]:
    """Yield what a config names by `auto_map`, and `owner/kernel`, which transformers downloads and runs; at any depth.

    A vision or text part has a config of its own inside.
    """
    todo = [node]
    while todo:
        here = todo.pop()
        for key, value in here.items() if isinstance(here, dict) else ():
            if key == "auto_map":
                yield from filter(None, texts(value))
            elif "_implementation" in key:
                yield from (text for text in texts(value) if "/" in text)
            else:
                todo.append(value)
        todo += here if isinstance(here, list) else []


def texts(node: Any) -> list[str]:
    """Return the texts in a value, its lists and its objects."""
    if isinstance(node, dict | list):
        return [text for value in (node.values() if isinstance(node, dict) else node) for text in texts(value)]
    return [node] if isinstance(node, str) else []
