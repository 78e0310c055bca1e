"""Files written whole and read with care: every atomic write of the project, every reader of what may be torn.

A process may be killed at any moment, so a file is written beside its final name and then renamed over it. A reader
sees the old content or the new content, never half of either. A folder may be somebody else's, so no link in it is
followed: a link could lead a reader to a private file, and a writer to a file that it destroys.
"""

import errno
import io
import json
import os
import shutil
import stat
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml

# libyaml is 10 times faster than PyYAML's own parser, but not every wheel has it.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
MOST_NODES = 1_000_000  # of a YAML file: a few lines of aliases can stand for billions


class LinkRefused(OSError):
    """A link, or something else that is no plain file, where a plain file was expected."""


def open_plain(path: Path, mode: str = "r") -> IO[Any]:
    """Open a plain file as `open` does (text is UTF-8), without following a link. Raises: LinkRefused.

    Nothing is opened that could block or act: no pipe, socket or device.
    """
    writes = {"r": os.O_RDONLY, "w": os.O_WRONLY | os.O_CREAT, "a": os.O_WRONLY | os.O_CREAT | os.O_APPEND}
    flags = writes[mode[0]] | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if path.is_symlink():
            raise LinkRefused(f"{path} is a link to {os.readlink(path)}: links are not followed here") from None
        raise error
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise LinkRefused(f"{path} is no plain file")
        if mode[0] != "r" and found.st_nlink > 1:
            raise LinkRefused(f"{path} has another name elsewhere (a hard link): it would be changed there too")
        if mode[0] == "w":
            os.ftruncate(descriptor, 0)
        return os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8")
    except BaseException:
        os.close(descriptor)
        raise


def refuse_links(folder: Path, *names: str) -> Path:
    """Return folder/names. Raises: LinkRefused if one of these names below `folder` is a link."""
    path = folder
    for part in (part for name in names for part in Path(name).parts):
        path = path / part
        if path.is_symlink():
            raise LinkRefused(f"{path} is a link to {os.readlink(path)}: links are not followed here")
    return path


def make_folder(folder: Path, *names: str) -> Path:
    """Return folder/names, made if it is missing. Raises: LinkRefused if one of these names is a link."""
    path = refuse_links(folder, *names)
    path.mkdir(parents=True, exist_ok=True)
    return path


def plain_files(folder: Path) -> Iterator[str]:
    """Yield the names of all files under a folder, in order. Raises: LinkRefused for a link, a pipe or a device."""
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        path = folder / entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from (f"{entry.name}/{name}" for name in plain_files(path))
        elif entry.is_file(follow_symlinks=False):
            yield entry.name
        else:
            refuse_links(folder, entry.name)
            raise LinkRefused(f"{path} is no plain file")


def copy_plain(source: Path, target: Path) -> None:
    """Copy a plain file to a new name. Raises: LinkRefused if the source is none; FileExistsError for the target."""
    with open_plain(source, "rb") as old, target.open("xb") as new:
        while block := old.read(1 << 24):
            new.write(block)


def remove(path: Path) -> None:
    """Remove a folder with all that is in it, or a link or file in its place. What a link points to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file in one step."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)  # left by a kill, or planted
    with partial.open("x", encoding="utf-8") as file:
        file.write(text)
    partial.replace(path)


def write_json(path: Path, value: Mapping[str, Any], indent: int = 2) -> None:
    """Write a JSON object in one step."""
    write_whole(path, json.dumps(dict(value), indent=indent, ensure_ascii=False))


def write_jsonl(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, all lines in one step."""
    write_whole(path, "".join(json.dumps(dict(line), ensure_ascii=False) + "\n" for line in lines))


def read_text(path: Path) -> str:
    """Return the text of a plain file."""
    with open_plain(path) as file:
        return str(file.read())


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; an empty one where the file is missing or not whole."""
    try:
        found: Any = json.loads(read_text(path))
    except LinkRefused:
        raise
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file with one per line; none where it is missing. A torn last line is left out."""
    return list(each_of_jsonl(path))


def each_of_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file with one per line, as `read_jsonl` returns them."""
    if not path.exists() and not path.is_symlink():
        return
    # not splitlines: JSON holds U+2028 as it is, in a text
    for number, line in enumerate(read_text(path).split("\n")[:-1], 1):
        if line.strip():
            try:
                found = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number} is not JSON ({error})") from None
            if isinstance(found, dict):
                yield found


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds; None where it is missing. Raises: ValueError if aliases make it huge."""
    try:
        found = yaml.load(read_text(path), LOADER)
    except FileNotFoundError:
        return None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    refuse_huge(found, path)
    return found


def refuse_huge(value: Any, path: Path) -> None:
    """Raise ValueError for a tree of more than MOST_NODES nodes. Each alias counts with all that it stands for."""
    todo, count = [value], 0
    while todo:
        node = todo.pop()
        todo += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        count += 1
        if count > MOST_NODES or len(todo) > MOST_NODES:
            raise ValueError(f"{path} has more than {MOST_NODES:,} values: its aliases repeat each other")


def to_yaml(value: Any) -> str:
    """Return a value as YAML, its keys in the order in which they are."""
    return str(yaml.dump(value, Dumper=DUMPER, sort_keys=False))


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make a folder survive a power cut: every file in it, every folder, and its own list of names."""
    for entry in os.scandir(folder):
        path = folder / entry.name
        sync_tree(path) if entry.is_dir(follow_symlinks=False) else sync(path)
    sync(folder)


@contextmanager
def spared_by_a_full_disk() -> Iterator[None]:
    """Warn instead of failing when the disk is full. For logs and metrics: a run must not end because of a log line.

    A buffered file keeps what it could not write, and tries again with the next write.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        warnings.warn(f"the disk is full, so a line of a log or of metrics was not written ({error})", stacklevel=3)


class Window(io.RawIOBase):
    """A part of an open file, as a file of its own. DCP has one too, whose seek from the end goes the wrong way."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self.file, self.start, self.length, self.at = file, start, length, 0

    def readable(self) -> bool:
        """It can be read."""
        return True

    def seekable(self) -> bool:
        """It can be sought in."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """As of any file."""
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.length}[whence]
        return self.at

    def readinto(self, buffer: Any, /) -> int:
        """As of any file."""
        self.file.seek(self.start + self.at)
        found = self.file.read(max(0, min(len(buffer), self.length - self.at)))
        buffer[: len(found)] = found
        self.at += len(found)
        return len(found)


def refuse_deflated(file: IO[bytes], name: str) -> None:
    """Raise ValueError if a file of tensors is compressed. `torch.save` never compresses, but `torch.load` inflates.

    2 MB of compressed zeros took 2 GB of memory.
    """
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        inside = next((i for i in archive.infolist() if i.compress_type != zipfile.ZIP_STORED), None)
    if inside is not None:
        raise ValueError(f"{name}: {inside.filename!r:.100} in it is compressed, as torch never writes it")
