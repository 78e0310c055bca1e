"""Folders: which files of a local folder hold data, and which split each belongs to, by its name.

The rules are those of `datasets`, so that a clone of a hub repository reads as it does from the hub: the YAML header of
README.md decides if it names files; else `data/SPLIT-00000-of-00001`, else the names of folders, else those of files,
else everything is `train`. Hidden files, and those that only describe a dataset, are left alone. One rule is our own:
upper case counts as lower case.
Source: https://huggingface.co/docs/hub/datasets-data-files-configuration
"""

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}.*\..*", re.IGNORECASE)
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "dummy_data.zip", "config.json")
BORDER = r"[-._ 0-9]"


@dataclass(frozen=True)
class Splits:
    """The files of each split, in order, and those of no split. `by_hand`: somebody named just these files."""

    files: Mapping[str, Sequence[Any]]
    left_alone: Sequence[Path] = ()
    by_hand: bool = False


def data_files(folder: Path) -> list[Path]:
    """Return the files below a folder, sorted, without hidden ones and those that describe a dataset."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in found if is_data(path.relative_to(folder))]


def is_data(path: Path) -> bool:
    """Return whether a file, named from its folder, may hold data: it is not hidden and no description."""
    folders = path.parts[:-1]
    hidden = any(part.startswith(".") for part in path.parts) or any(part.startswith("__") for part in folders)
    return not hidden and path.name.lower() not in (*DESCRIPTIONS, "readme.md")


def splits_by_name(files: Sequence[Path], folder: Path) -> Splits:
    """Return the splits that the names of these files show. Raises: ValueError for a name that shows two."""
    names = [path.relative_to(folder).as_posix() for path in files]
    for rule in (shard, by_folder, by_file):
        shown = [rule(name) for name in names]
        if any(shown):
            break
    else:
        return Splits({"train": files} if files else {})
    found: dict[str, list[Path]] = {}
    for path, theirs in zip(files, shown, strict=True):
        if len(theirs) > 1:
            raise ValueError(
                f"{path}: its name shows {' and '.join(theirs)}; name the files of one split, or rename it"
            )
        for split in theirs:
            found.setdefault(split, []).append(path)
    known = [split for split in WORDS if split in found]
    return Splits(
        {split: found[split] for split in [*known, *sorted(found.keys() - WORDS)]},
        [path for path, theirs in zip(files, shown, strict=True) if not theirs],
    )


def shard(name: str) -> list[str]:
    """Return the split of `data/train-00000-of-00001.parquet`."""
    match = SHARD.fullmatch(name)
    return [match.group(1).lower()] if match else []


def by_folder(name: str) -> list[str]:
    """Return the splits that the folders of a file show."""
    return shown_by(PurePosixPath(name).parts[:-1], BORDER + "|$")


def by_file(name: str) -> list[str]:
    """Return the splits that the name of a file shows; something must stand behind the word, if only the suffix."""
    return shown_by([PurePosixPath(name).name], BORDER)


def shown_by(parts: Iterable[str], behind: str) -> list[str]:
    """Return the splits whose words stand in these names, each between borders."""
    said = {
        split: re.compile(rf"(?:^|{BORDER})(?:{'|'.join(words)})(?:{behind})", re.IGNORECASE)
        for split, words in WORDS.items()
    }
    return [split for split, word in said.items() if any(word.search(part) for part in parts)]


def described(folder: Path, subset: str | None, key: str) -> tuple[Splits | None, str | None]:
    """Return the splits that the header of README.md names, if it does, and the subset that it names them for.

    Raises: ValueError if it describes several subsets and none is chosen, or not the one that is.
    """
    configs = header(folder / "README.md").get("configs")
    configs = {str(c["config_name"]): c for c in configs or () if isinstance(c, Mapping) and c.get("data_files")}
    if not configs:
        return None, None
    named = subset.removesuffix("?") if subset else None
    marked = [name for name, config in configs.items() if config.get("default") or name == "default"]
    if named in configs:
        chosen = named
    elif subset is not None and not subset.endswith("?"):
        raise ValueError(f"{key}={subset}: no such subset; README.md names {', '.join(configs)}")
    elif marked or len(configs) == 1:
        chosen = (marked or list(configs))[0]
    else:
        raise ValueError(f"{folder}: README.md names several subsets; set {key} to one of {', '.join(configs)}")
    files = data_files(folder)
    found: dict[str, list[Path]] = {}
    for split, patterns in patterns_of(configs[chosen]["data_files"]).items():
        regex = [re.compile(fnmatch.translate(str(p).removeprefix("./"))) for p in patterns]
        found[split] = [f for f in files if any(r.match(f.relative_to(folder).as_posix()) for r in regex)]
        if not found[split]:
            raise ValueError(f"{folder}: README.md names {', '.join(map(str, patterns))} for {split}: no file matches")
    return Splits(found), chosen


def header(readme: Path) -> Mapping[str, Any]:
    """Return the YAML between the two `---` at the top of a README.md; an empty one if there is none."""
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    match = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", text, re.DOTALL)
    try:
        found = yaml.safe_load(match.group(1)) if match else None
    except yaml.YAMLError as error:
        raise ValueError(f"{readme}: its header is not YAML ({' '.join(str(error).split())})") from None
    return found if isinstance(found, Mapping) else {}


def patterns_of(given: Any) -> dict[str, list[str]]:
    """Return {split: patterns} of the three ways in which `data_files` may be written."""
    if isinstance(given, list) and any(isinstance(entry, Mapping) for entry in given):
        given = {str(entry["split"]): entry["path"] for entry in given}
    if not isinstance(given, Mapping):
        given = {"train": given}
    return {str(split): [paths] if isinstance(paths, str) else list(paths) for split, paths in given.items()}
