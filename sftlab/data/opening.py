"""Opening: what a data path names. A file, a folder, a glob, a dataset saved with `datasets`, or a hub id.

It reads the split that was named, or refuses it: nobody trains on a test split because a setting had no effect.
"""

import glob
import gzip
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path

from sftlab.common.hub import POINTER, is_pointer
from sftlab.data import limits
from sftlab.data.delimited import Delimited
from sftlab.data.folder import Splits, by_file, data_files, described, is_data, splits_by_name
from sftlab.data.source import COMPRESSED, Lines, RowsOf, Several, Source, Stretch, file_digest, kind_of, open_json
from sftlab.data.table import Table, datasets_cache, is_saved, load, load_saved

LINES = (".jsonl", ".ndjson")
CELLS = {".csv": ",", ".tsv": "\t"}
KINDS = (*LINES, ".json", ".parquet", *CELLS)
OTHER_CELLS = (";", "\t", "|", ",")
GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Keys:
    """The config keys of a path and of what is chosen from it, for messages."""

    path: str = "data.path"
    split: str = "data.split"
    group: str = "data"


def open_source(
    path: str,
    split: str | None,
    rows_of: RowsOf,
    keys: Keys = Keys(),
    subset: str | None = None,
    revision: str | None = None,
) -> Source:
    """Return the rows of a split (all splits for None) at a local path, else of a hub id.

    `rows_of` finds the rows in a JSON document. A setting that ends with `?` counts only where it means something.
    Raises: FileNotFoundError, ValueError or ConnectionError, which say what to type instead.
    """
    if not is_local(path):
        if not may_be_hub_id(path):
            raise FileNotFoundError(f"{keys.path}={path}: no such file or folder")
        subset, split = (name and name.removesuffix("?") for name in (subset, split))
        loaded = load(path, keys.path, subset=subset, split=split, revision=revision)
        if not isinstance(loaded, dict):
            return Table(path, loaded)
        return _several(path, [Table(f"{path} {name}", dataset) for name, dataset in loaded.items()])
    if revision is not None:
        raise ValueError(f"{keys.group}.revision={revision} has no effect: {keys.path}={path} is local")
    found = local_splits(path, keys, subset)
    opened = {name: partial(_join, path, parts, rows_of, keys.path) for name, parts in found.files.items()}
    source = select(opened, split, f"{keys.path}={path}", keys.split, found.by_hand)
    return Several(path, [source], [str(file) for file in found.left_alone]) if found.left_alone else source


def is_local(path: str) -> bool:
    """Return whether a data path is a local file, folder or glob."""
    return Path(path).expanduser().exists() or GLOB.search(path) is not None


def may_be_hub_id(path: str) -> bool:
    """Return whether a path that is not there may be a dataset's name on the hub, and no typing error."""
    absolute = Path(path).expanduser().is_absolute() or path.startswith((".", "~"))
    return not absolute and path.count("/") == 1 and kind_of(Path(path)) not in KINDS


def split_names(path: str, subset: str | None) -> list[str]:
    """Return the splits that a local path has."""
    return list(local_splits(path, Keys(), subset).files)


def local_splits(path: str, keys: Keys, subset: str | None) -> Splits:
    """Return the files, or the tables, of each split of a local path. Raises: ValueError for a subset that is not."""
    local, asked, used = Path(path).expanduser(), None if subset is None or subset.endswith("?") else subset, None
    if local.is_file():
        found = Splits({(by_file(local.name) or ["train"])[0]: [local]}, by_hand=True)
    elif local.is_dir() and is_saved(local):
        saved = {name: [Table(f"{path} {name}", dataset)] for name, dataset in load_saved(local).items()}
        found = Splits(saved, by_hand=len(saved) == 1)
    elif local.is_dir():
        told, used = described(local, subset, f"{keys.group}.subset")
        found = told or splits_by_name(_readable(data_files(local), keys, path), local)
    else:
        files = sorted(Path(file) for file in glob.glob(str(local), recursive=True))
        files = _readable([file for file in files if file.is_file() and is_data(Path(file.name))], keys, path)
        found = splits_by_name(files, Path(*takewhile(lambda part: not GLOB.search(part), local.parts)))
        if len(found.files) == 1:
            found = Splits({next(iter(found.files)): files}, by_hand=True)
    if asked and asked != used:
        raise ValueError(f"{keys.group}.subset={asked} has no effect: {keys.path}={path} is local, without subsets")
    return found


def _readable(files: Sequence[Path], keys: Keys, path: str) -> list[Path]:
    found = [file for file in files if kind_of(file) in KINDS]
    if not found:
        what = "the folder holds no file that can be read" if Path(path).expanduser().is_dir() else "no file matches"
        if path.startswith("["):
            what += (
                ". One path is expected: a file, a folder, or a glob such as rows/*.jsonl (several sets: data=mixture)"
            )
        raise FileNotFoundError(
            f"{keys.path}={path}: {what}; expected {', '.join(KINDS)}, each perhaps with .gz or .zst"
        )
    return found


def select(
    splits: Mapping[str, Callable[[], Source]], wanted: str | None, path: str, key: str, by_hand: bool
) -> Source:
    """Return the rows of `wanted`, as `datasets` writes it (`test`, `train[:10%]`, `train+test`); None for all.

    Files named by hand are also called `train`, whatever their names show. Raises: ValueError for a split that is not
    there.
    """
    if wanted is None:
        return _several(path, [open_split() for open_split in splits.values()])
    names = [part.split("[")[0].strip() for part in wanted.split("+")]
    known = {name: splits.get(name) for name in names}
    if by_hand and "train" in known:
        known["train"] = known["train"] or next(iter(splits.values()))
    absent = [name for name, found in known.items() if found is None]
    if absent:
        raise ValueError(
            f"{key}={wanted}: {path} has no split {absent[0]}; it has {', '.join(splits)}, as file names or README.md "
            f"tell. Set {key} to one of these (null: all rows), or name the files"
        )
    opened = {name: found() for name, found in known.items() if found}
    if wanted in opened:
        return opened[wanted]
    from datasets import ReadInstruction

    try:
        parts = ReadInstruction.from_spec(wanted).to_absolute({name: len(source) for name, source in opened.items()})
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{key}={wanted}: {error}") from None
    return _several(path, [Stretch(opened[p.splitname], p.from_, p.to) for p in parts])


def _join(path: str, parts: Sequence[Path | Table], rows_of: RowsOf, key: str) -> Source:
    return _several(path, [open_file(part, rows_of, key) if isinstance(part, Path) else part for part in parts])


def _several(path: str, parts: Sequence[Source]) -> Source:
    return parts[0] if len(parts) == 1 else Several(path, parts)


def not_what_it_is_called(path: Path, kind: str) -> str | None:
    """Return what is wrong with a file whose first bytes are those of another kind than its name says; else None."""
    if is_pointer(path):
        return f"this {POINTER}"
    with path.open("rb") as file:
        begin = file.read(65536)
    packed = path.suffix.lower() in COMPRESSED
    for suffix, magic in COMPRESSED.items():
        if begin.startswith(magic) and not packed:
            return f"it is compressed: name it {path.name}{suffix}"
    if packed or kind == ".parquet":
        return None
    if begin.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "it is UTF-16, and UTF-8 is expected: iconv -f UTF-16 -t UTF-8 FILE > NEW"
    if b"\r" in begin and b"\n" not in begin:
        return "its lines end in a carriage return alone, and a line feed is expected: tr '\\r' '\\n' < FILE > NEW"
    if kind in LINES:
        first, _, rest = begin.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")
        first = first.strip()
        if first == b"[" or (first.startswith(b"[") and not rest.strip()):
            return "it begins with a list, and an object in each line is expected. One list of all rows is a .json"
        if first == b"{":
            return "its first object goes over several lines, and one in each line is expected: jq -c . FILE > NEW"
    return None


def num_rows(path: Path) -> int:
    """Return how many rows a Parquet file has, from its last bytes; -1 where they cannot be read."""
    import pyarrow.parquet

    try:
        return int(pyarrow.parquet.read_metadata(path).num_rows)
    except pyarrow.ArrowInvalid:
        return -1


def open_file(path: Path, rows_of: RowsOf, key: str) -> Source:
    """Return the rows of one file. Raises: ValueError that names it."""
    kind = kind_of(path)
    if kind not in KINDS:
        raise ValueError(f"{key}={path}: cannot read a {kind or 'file without suffix'}; expected {', '.join(KINDS)}")
    if path.stat().st_size == 0:
        raise ValueError(f"{key}={path}: the file is empty")
    if why := not_what_it_is_called(path, kind):
        raise ValueError(f"{key}={path}: {why}")
    try:
        if kind in LINES:
            return Lines.open(path)
        if kind == ".json":
            return open_json(path, rows_of)
        if kind in CELLS:
            opened = Delimited.open(path, CELLS[kind])
            found = [c for c in OTHER_CELLS if c != CELLS[kind] and c in opened.header[0]]
            if len(opened.header) == 1 and found:
                raise ValueError(
                    f"{key}={path}: its header is one cell, {opened.header[0]!r}, so its cells end in {found[0]!r}. "
                    f"Write it with {CELLS[kind]!r} between them"
                )
            return opened
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path}: cannot read this file: {type(error).__name__}: {error}") from None
    limits.refuse_gzip_bomb(path)
    if path.suffix.lower() == ".parquet":
        limits.refuse_parquet_bomb(path)
        if not num_rows(path):
            raise ValueError(f"{key}={path}: the file holds no row")
    digest = file_digest(path)
    options = {"data_files": glob.escape(str(path)), "split": "train"}
    # `datasets` knows a file by its size and time only: in a folder of their own, changed bytes are never overlooked.
    options["cache_dir"] = str(Path(datasets_cache()) / "sftlab-files" / digest)
    return Table(str(path), load("parquet", key, shown=str(path), **options), digest)
