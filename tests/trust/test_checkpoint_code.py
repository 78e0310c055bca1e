"""A checkpoint that somebody else made: nothing in its index runs, and no file outside of it is read."""

import io
import json
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import CheckpointException, load
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo

from sftlab.checkpoints import manifest
from sftlab.checkpoints.hugging_face import weights_of
from sftlab.checkpoints.index import read_index
from sftlab.common.files import LinkRefused

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
DCP = "torch.distributed.checkpoint.metadata"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of two tensors and a text, as DCP writes it."""
    from torch.distributed.checkpoint.state_dict_saver import save

    path = tmp_path / "run/checkpoints/step_00000001"
    state = {"model": {"model": {"w": torch.arange(12.0).reshape(3, 4), "b": torch.ones(3).bfloat16()}}, "rng": "x"}
    save(state, checkpoint_id=str(path), no_dist=True)
    sign(path)
    return path


def sign(path: Path) -> None:
    """Write the manifest that belongs to the files as they are: whoever made the folder can do that too."""
    files = {p.name: [p.stat().st_size, zlib.crc32(p.read_bytes())] for p in path.iterdir() if p.name != manifest.NAME}
    (path / manifest.NAME).write_text(json.dumps({"step": 1, "files": files}))


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def name(module: str, attribute: str) -> bytes:
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


class Calls:
    """Pickled as a call of a function."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.made = (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.made


def dataclass_exec(marker: Path, good: bytes) -> bytes:
    """`dataclass(StorageMeta)` executes a text in which a field's name is code (D-1 of the review)."""
    code = f"a=__import__('pathlib').Path({str(marker)!r}).touch(),*b"
    flags = b"(" + text("init") + b"\x89" + text("repr") + b"\x89" + text("compare") + b"\x89u"
    field = name(DCP, "field") + b")Rr" + struct.pack("<I", 1000) + b"N}" + flags + b"\x86b0"
    state = b"(" + text("__annotations__") + b"}" + text(code) + text("int") + b"s" + text(code) + b"j"
    meta = name(DCP, "StorageMeta") + b"N}" + state + struct.pack("<I", 1000) + b"u\x86b0"
    return b"\x80\x04" + field + meta + name(DCP, "dataclass") + name(DCP, "StorageMeta") + b"\x85R0" + good[2:]


def set_on_a_class(marker: Path, good: bytes) -> bytes:
    """State put on a class of the index: the next honest record would call it."""
    state = b"}" + text("__init__") + name(DCP, "MetadataIndex") + b"s"
    return b"\x80\x04" + name(DCP, "StorageMeta") + b"N" + state + b"\x86b0" + good[2:]


def setstate_of_a_class(marker: Path, good: bytes) -> bytes:
    """State given to a class in place of an object."""
    return b"\x80\x04" + name(DCP, "Metadata") + b"}" + text("version") + text("9") + b"sb0" + good[2:]


def calls(*made: Any) -> Callable[[Path, bytes], bytes]:
    """Return what writes a pickle that calls a function with the marker's path."""

    def write(marker: Path, good: bytes) -> bytes:
        function, *arguments = made
        return pickle.dumps(Calls(function, *[a.format(marker) if isinstance(a, str) else a for a in arguments]))

    return write


def through_getattr(marker: Path, good: bytes) -> bytes:
    """getattr is on the list, because some Pythons pickle an enum's member by it; here it reaches for globals."""
    init = Calls(getattr, dcp.StorageMeta, "__init__")
    return pickle.dumps(Calls(getattr, init, "__globals__"))


def member_of_a_module(marker: Path, good: bytes) -> bytes:
    return b"\x80\x04" + name(DCP, "os.system") + text(f"touch {marker}") + b"\x85R."


def extension(marker: Path, good: bytes) -> bytes:
    """A number from copyreg's registry in place of a name, and a persistent id: both lead out of the file."""
    return b"\x80\x04" + text("an id") + b"Q."


CODE = {
    "dataclass": dataclass_exec,
    "set on a class": set_on_a_class,
    "setstate of a class": setstate_of_a_class,
    "os.system": calls(__import__("os").system, "touch {}"),
    "eval": calls(eval, "open({!r}, 'w')"),
    "Path.touch by operator": calls(__import__("operator").methodcaller, "touch"),
    "getattr": through_getattr,
    "a dotted name": member_of_a_module,
    "torch.load": calls(torch.load, "{}"),
    "a persistent id": extension,
}


@pytest.mark.parametrize("how", CODE)
def test_an_index_with_code_is_refused_and_nothing_runs(how: str, checkpoint: Path) -> None:
    marker = checkpoint.parent / "it_ran"
    good = (checkpoint / manifest.METADATA).read_bytes()
    bad = CODE[how](marker, good)
    assert pickletools.genops(bad) and bad != good
    (checkpoint / manifest.METADATA).write_bytes(bad)
    sign(checkpoint)
    before = {kind: dict(vars(kind)) for kind in (dcp.StorageMeta, dcp.Metadata, dcp.MetadataIndex)}
    with pytest.raises(pickle.UnpicklingError, match=r"checkpoint's index"):
        manifest.Reader(checkpoint).read_metadata()
    assert not marker.exists()
    assert before == {kind: dict(vars(kind)) for kind in before}  # no class of torch has changed


def changed(edit: Callable[[Any], None]) -> Callable[[Path], None]:
    """Return what rewrites an index by torch's own classes."""

    def write(checkpoint: Path) -> None:
        found = FileSystemReader(checkpoint).read_metadata()
        edit(found)
        (checkpoint / manifest.METADATA).write_bytes(pickle.dumps(found))
        sign(checkpoint)

    return write


def first_part(found: Any) -> Any:
    return next(part for at, part in found.storage_data.items() if at.fqn.endswith("w"))


def point_at(path: str) -> Callable[[Any], None]:
    return lambda found: setattr(first_part(found), "relative_path", path)


def huge(found: Any) -> None:
    entry = found.state_dict_metadata["model.model.w"]
    entry.size = torch.Size((1 << 40, 4))
    entry.chunks[0].sizes = entry.size


def with_a_hole(found: Any) -> None:
    found.state_dict_metadata["model.model.w"].size = torch.Size((6, 4))


def transformed(found: Any) -> None:
    first_part(found).transform_descriptors = ["stream.zstd"]


def not_described(found: Any) -> None:
    found.storage_data[dcp.MetadataIndex("other")] = _StorageInfo("__0_0.distcp", 0, 8)


PATHS = {
    "out of the folder": point_at("../../../secret.distcp"),
    "absolute": point_at("/etc/hostname"),
    "in another step": point_at("../step_00000002/__0_0.distcp"),
    "hidden": point_at(".netrc"),
    "negative": lambda found: setattr(first_part(found), "offset", -4),
    "larger than its file": huge,
    "with parts missing": with_a_hole,
    "transformed": transformed,
    "not described": not_described,
}


@pytest.mark.parametrize("how", PATHS)
def test_an_index_reads_its_own_files_and_no_more_memory_than_they_take(how: str, checkpoint: Path) -> None:
    changed(PATHS[how])(checkpoint)
    with pytest.raises(pickle.UnpicklingError):
        weights_of(checkpoint, torch.float32)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", manifest.NAME])
def test_a_file_of_a_checkpoint_that_is_a_link_is_not_followed(name: str, checkpoint: Path) -> None:
    elsewhere = checkpoint.parent.parent.parent / "mine"
    (checkpoint / name).rename(elsewhere)
    (checkpoint / name).symlink_to(elsewhere)
    assert "is a link to" in "".join(manifest.damage(checkpoint))
    if name != manifest.NAME:
        with pytest.raises(LinkRefused):
            weights_of(checkpoint, torch.float32)


@pytest.mark.parametrize("named", ["../../../secret", "/etc/hostname", "hf/../../x", "", "a\\..\\b"])
def test_a_manifest_lists_files_of_its_own_folder_only(named: str, checkpoint: Path) -> None:
    listed = json.loads((checkpoint / manifest.NAME).read_text())
    listed["files"][named] = [0, 0]
    (checkpoint / manifest.NAME).write_text(json.dumps(listed))
    (line,) = manifest.damage(checkpoint)
    assert "is no file of a checkpoint" in line


def test_an_honest_index_is_read_as_torch_reads_it(checkpoint: Path) -> None:
    ours, theirs = manifest.Reader(checkpoint).read_metadata(), FileSystemReader(checkpoint).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata and ours.storage_data == theirs.storage_data
    assert ours.planner_data == theirs.planner_data
    found = weights_of(checkpoint, torch.float32)
    assert torch.equal(found["w"], torch.arange(12.0).reshape(3, 4)) and found["b"].dtype == torch.float32
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert read_index(pickle.dumps(theirs, protocol)).storage_data == theirs.storage_data


def test_a_tensor_that_inflates_is_refused_unread(checkpoint: Path) -> None:
    """Torch inflates what is compressed: 2 MB on disk became 2 GB in memory."""
    index = FileSystemReader(checkpoint).read_metadata()
    at, part = next((at, part) for at, part in index.storage_data.items() if at.fqn.endswith("w"))
    file = checkpoint / part.relative_path
    stored, packed = io.BytesIO(), io.BytesIO()
    torch.save(torch.zeros(1 << 20), stored)
    with zipfile.ZipFile(stored) as plain, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as small:
        for entry in plain.infolist():
            small.writestr(entry.filename, plain.read(entry.filename))
    content = file.read_bytes()
    file.write_bytes(content + packed.getvalue())
    index.storage_data[at] = _StorageInfo(part.relative_path, len(content), len(packed.getvalue()))
    (checkpoint / manifest.METADATA).write_bytes(pickle.dumps(index))
    sign(checkpoint)
    state = {"model": {"model": {"w": torch.zeros(3, 4)}}}
    with pytest.raises(CheckpointException, match="is compressed, as torch never writes it"):
        load(state, storage_reader=manifest.Reader(checkpoint), planner=manifest.Planner(), no_dist=True)
