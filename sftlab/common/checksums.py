"""SHA256SUMS: the checksums of a folder's files, in the form that `sha256sum -c SHA256SUMS` reads."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from sftlab.common.files import open_plain, plain_files, read_text, refuse_links, write_whole

NAME = "SHA256SUMS"
LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")


class Changed(ValueError):
    """A folder that is not what was written."""


def write(folder: Path) -> None:
    """Write the checksums of all files in a folder."""
    write_list(folder, {name: sha256(folder / name) for name in plain_files(folder) if name != NAME})


def write_list(folder: Path, sums: Mapping[str, str]) -> None:
    """Write {name: checksum} into a folder, if there are any."""
    if sums:
        write_whole(folder / NAME, "".join(f"{sums[name]}  {name}\n" for name in sums))


def read(folder: Path) -> dict[str, str]:
    """Return {name: checksum}; none where the folder has no list. Raises: Changed if the list is none."""
    if not (folder / NAME).exists():
        return {}
    found = [LINE.fullmatch(line) for line in read_text(folder / NAME).splitlines()]
    sums = {line[2]: line[1] for line in found if line}
    if len(sums) != len(found) or any(".." in Path(name).parts or Path(name).is_absolute() for name in sums):
        raise Changed(f"{folder / NAME} is no list of checksums")
    return sums


def verify(folder: Path) -> None:
    """Raise Changed, naming every file that is missing or differs from the folder's list. No list: nothing to check."""
    wrong = []
    for name, expected in read(folder).items():
        path = refuse_links(folder, name)
        if not path.is_file():
            wrong.append(f"{path} is missing")
        elif sha256(path) != expected:
            wrong.append(f"{path} has changed: its checksum differs from {NAME}")
    if wrong:
        raise Changed("\n".join([f"{folder} is not what was exported:", *wrong]))


def sha256(path: Path) -> str:
    """Return the SHA-256 of a plain file."""
    digest = hashlib.sha256()
    with open_plain(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
