"""The manifest makes a checkpoint folder whole: `checkpoint.json`, written last, has each file's size and checksum.

A folder without it is not a checkpoint. A folder whose files differ from it is damaged, and every wrong file is named.
The pickles in a folder (DCP's own `.metadata`, and small settings) are read without running code they may ask for.
"""

import io
import json
import os
import pickle
import zlib
from collections.abc import Iterable, Mapping
from enum import EnumType
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

PREFIX = "step_"  # of the folders of a run's checkpoints
NAME = "checkpoint.json"
METADATA = ".metadata"
BLOCK_BYTES = 1 << 24


class Damaged(ValueError):
    """A checkpoint that is not what was written."""


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, oldest first."""
    return sorted(p for p in folder.glob(f"{PREFIX}*") if (p / NAME).is_file())


def is_checkpoint(path: Path) -> bool:
    """Return whether a path is one checkpoint's folder."""
    return (path / NAME).is_file()


def sizes_and_checksums(folder: Path, names: Iterable[str]) -> dict[str, list[int]]:
    """Return {name: [size in bytes, CRC-32]} of files, read back from the disk."""
    return {name: [(folder / name).stat().st_size, checksum(folder / name)] for name in names}


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    crc = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            crc = zlib.crc32(block, crc)
    return crc


def write_manifest(folder: Path, progress: Mapping[str, Any], files: Mapping[str, list[int]]) -> None:
    """Write the manifest, which completes a checkpoint. Raises: Damaged if a file is shorter than what was written."""
    for part in Reader(folder).read_metadata().storage_data.values():
        size = files.get(part.relative_path, [0])[0]
        if size < part.offset + part.length:
            raise Damaged(f"{part.relative_path} has {size} bytes, expected {part.offset + part.length} or more")
    with (folder / NAME).open("w") as file:
        json.dump({**progress, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the progress and the files of a manifest. Raises: Damaged."""
    try:
        progress = json.loads((folder / NAME).read_text())
        if not isinstance(progress["step"], int) or not isinstance(progress["files"], dict):
            raise TypeError("step and files are not what they should be")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{folder / NAME}: {error}") from None
    return dict(progress)


def damage(folder: Path, part: int = 0, num_parts: int = 1) -> list[str]:
    """Return what is wrong with a checkpoint, one line per file; every `num_parts`-th file is read.

    Reading runs at 1 to 3 GB per second and brings the files into the page cache, from which they are loaded next.
    """
    try:
        files: dict[str, list[int]] = read_manifest(folder)["files"]
    except Damaged as error:
        return [str(error)]
    wrong = []
    for name in sorted(files)[part::num_parts]:
        size, crc = files[name]
        try:
            found = (folder / name).stat().st_size
            if found < size:
                wrong.append(f"{folder / name} is truncated: {found} of {size} bytes")
            elif found > size or checksum(folder / name) != crc:
                wrong.append(f"{folder / name} is corrupted: its checksum differs")
        except FileNotFoundError:
            wrong.append(f"{folder / name} is missing")
        except OSError as error:
            wrong.append(f"{folder / name} cannot be read: {error}")
    return wrong


class Reader(FileSystemReader):
    """DCP's reader, with an unpickler that accepts only DCP's own records."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index of the checkpoint's tensors."""
        metadata: Metadata = RecordsOnly(io.BytesIO((Path(self.path) / METADATA).read_bytes())).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class RecordsOnly(pickle.Unpickler):
    """An unpickler for `.metadata`."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class or constant that DCP's index consists of. Raises: UnpicklingError for anything else."""
        if (module, name) == ("builtins", "getattr"):
            return member  # how Python 3.11.0 to 3.11.3 pickle an enum's member
        known = module == "torch.distributed.checkpoint.metadata"
        constant = module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        other = (module, name) in {
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.serialization", "_get_layout"),
            ("pathlib", "PosixPath"),
            ("pathlib", "WindowsPath"),
            ("pathlib._local", "PosixPath"),
            ("collections", "OrderedDict"),
        }
        if "." in name or not (known or constant or other):
            raise pickle.UnpicklingError(f"a checkpoint's index asks for {module}.{name}: it is not one of ours")
        return super().find_class(module, name)


def member(kind: Any, name: str) -> Any:
    """Return the member `name` of an enum. Raises: UnpicklingError if `kind` is no enum."""
    if not isinstance(kind, EnumType):
        raise pickle.UnpicklingError(f"a checkpoint's index asks for {name} of {kind!r}: it is not one of ours")
    return kind[name]


class Planner(DefaultLoadPlanner):
    """DCP's planner, but it loads values that are not tensors with weights_only=True."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Load one such value into its place."""
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)
