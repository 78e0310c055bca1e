"""The manifest makes a checkpoint folder whole: `checkpoint.json`, written last, has each file's size and checksum.

A folder without it is not a checkpoint. A folder whose files differ from it is damaged, and every wrong file is named.
DCP's own index is read as data (index.py), small settings with weights_only: no code in a checkpoint runs.
"""

import io
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

from sftlab.checkpoints.index import read_index
from sftlab.common.files import Window, open_plain, read_text, refuse_deflated, refuse_links

PREFIX = "step_"  # of the folders of a run's checkpoints
NAME = "checkpoint.json"
METADATA = ".metadata"
BLOCK_BYTES = 1 << 24


class Damaged(ValueError):
    """A checkpoint that is not what was written."""


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, oldest first.

    Raises: LinkRefused for a link, which could lead to a private run: its model would be exported into this one.
    """
    refuse_links(folder.parent, folder.name)
    return sorted(refuse_links(folder, p.name) for p in folder.glob(f"{PREFIX}*") if (p / NAME).is_file())


def is_checkpoint(path: Path) -> bool:
    """Return whether a path is one checkpoint's folder."""
    return (path / NAME).is_file()


def sizes_and_checksums(folder: Path, names: Iterable[str]) -> dict[str, list[int]]:
    """Return {name: [size in bytes, CRC-32]} of files, read back from the disk."""
    return {name: [(folder / name).stat().st_size, checksum(folder / name)] for name in names}


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    crc = 0
    with open_plain(path, "rb") as file:
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
        progress = json.loads(read_text(folder / NAME))
        if not isinstance(progress["step"], int) or not isinstance(progress["files"], dict):
            raise TypeError("step and files are not what they should be")
        for name, (size, crc) in progress["files"].items():
            if not isinstance(size, int) or not isinstance(crc, int) or not inside(name):
                raise ValueError(f"{name} is no file of a checkpoint with a size and a checksum")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"{folder / NAME}: {error}") from None
    return dict(progress)


def inside(name: str) -> bool:
    """Return whether a name in a manifest is that of a file in the folder, or in a folder in it."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name and path.name != ""


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
            found = refuse_links(folder, name).stat().st_size
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
    """DCP's reader; it reads the index as data, and no file that lies outside of the checkpoint or is a link."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index of the checkpoint's tensors. Raises: UnpicklingError, LinkRefused."""
        folder = Path(self.path)
        with open_plain(folder / METADATA, "rb") as file:
            metadata = read_index(file.read())
        for name in {part.relative_path for part in metadata.storage_data.values()}:
            refuse_links(folder, name)
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        """Return the part of a file that holds one value. Raises: ValueError if it would inflate."""
        window = Window(file, sinfo.offset, sinfo.length)
        refuse_deflated(io.BufferedReader(window), f"{sinfo.relative_path} of the checkpoint")
        return super()._slice_file(file, sinfo)


class Planner(DefaultLoadPlanner):
    """DCP's planner, but it loads values that are not tensors with weights_only=True."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Load one such value into its place."""
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)
