"""A checkpoint folder is whole or the file that is not is named; what is in it is never run."""

import json
import pickle
import re
import zlib
from pathlib import Path

import pytest
import torch

from sftlab.checkpoints import manifest
from sftlab.checkpoints.index import Inert, Record, read_index


def whole(folder: Path) -> Path:
    from torch.distributed.checkpoint.state_dict_saver import save

    path = folder / "step_00000001"
    save({"x": torch.arange(1000.0), "y": {"z": torch.ones(10)}}, checkpoint_id=str(path), no_dist=True)
    manifest.write_manifest(path, {"step": 1}, manifest.sizes_and_checksums(path, ["__0_0.distcp", ".metadata"]))
    return path


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_an_untouched_checkpoint_is_whole(tmp_path: Path) -> None:
    path = whole(tmp_path)
    assert manifest.damage(path) == [] and manifest.read_manifest(path)["step"] == 1
    assert manifest.complete_checkpoints(tmp_path) == [path]


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
@pytest.mark.parametrize("how", ["truncated", "corrupted", "missing"])
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path: Path, name: str, how: str) -> None:
    path = whole(tmp_path)
    file = path / name
    content = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    (line,) = manifest.damage(path)
    assert str(file) in line and how in line
    assert manifest.damage(path, 0, 2) + manifest.damage(path, 1, 2) == [line], "one rank or the other reads it"


def test_a_folder_without_its_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    path = whole(tmp_path)
    (path / manifest.NAME).write_text('{"step": 1, "fil')
    assert "checkpoint.json" in manifest.damage(path)[0]
    (path / manifest.NAME).unlink()
    assert manifest.complete_checkpoints(tmp_path) == []


@pytest.mark.parametrize("missing", [1, 100])
def test_a_file_shorter_than_its_tensors_completes_no_checkpoint(tmp_path: Path, missing: int) -> None:
    path = whole(tmp_path)
    (path / manifest.NAME).unlink()
    shard = path / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-missing])
    with pytest.raises(manifest.Damaged, match=r"__0_0\.distcp has"):
        manifest.write_manifest(path, {"step": 1}, manifest.sizes_and_checksums(path, ["__0_0.distcp", ".metadata"]))
    assert not (path / manifest.NAME).exists()


def test_the_complete_ones_are_listed_oldest_first(tmp_path: Path) -> None:
    names = ["step_00000010", "step_00000002", "aside_1_step_00000003", ".step_00000011.partial", "other"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint.json").write_text("{}")
    (tmp_path / "step_00000012").mkdir()
    assert [p.name for p in manifest.complete_checkpoints(tmp_path)] == ["step_00000002", "step_00000010"]
    assert manifest.is_checkpoint(tmp_path / "other") and not manifest.is_checkpoint(tmp_path / "step_00000012")


def test_a_checksum_is_of_the_whole_file_however_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(200)) * 3
    (tmp_path / "file").write_bytes(content)
    monkeypatch.setattr(manifest, "BLOCK_BYTES", 7)
    assert manifest.checksum(tmp_path / "file") == zlib.crc32(content)
    assert manifest.sizes_and_checksums(tmp_path, ["file"]) == {"file": [600, zlib.crc32(content)]}


def test_each_kind_of_damage_in_words_and_each_file_read_by_one_rank(tmp_path: Path) -> None:
    sizes = {"a_short": 4, "b_long": 9, "c_right": 6, "d_other": 6, "f_folder": 0}
    files = {name: [6, zlib.crc32(b"abcdef")] for name in sizes} | {"e_missing": [6, 0]}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"abcdefghi"[:size])
    (tmp_path / "d_other").write_bytes(b"abcdeg")
    (tmp_path / "f_folder").unlink()
    (tmp_path / "f_folder").mkdir()
    files["f_folder"] = [(tmp_path / "f_folder").stat().st_size, 0]
    (tmp_path / "checkpoint.json").write_text(json.dumps({"step": 1, "files": files}))
    expected = [
        f"{tmp_path / 'a_short'} is truncated: 4 of 6 bytes",
        f"{tmp_path / 'b_long'} is corrupted: its checksum differs",
        f"{tmp_path / 'd_other'} is corrupted: its checksum differs",
        f"{tmp_path / 'e_missing'} is missing",
    ]
    *first, last = manifest.damage(tmp_path)
    assert first == expected and last.startswith(f"{tmp_path / 'f_folder'} cannot be read: ")
    parts = [manifest.damage(tmp_path, part, 3) for part in range(3)]
    assert parts == [[expected[0], expected[2]], [expected[1], expected[3]], [last]]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"step": 1}',
        '{"files": {}}',
        '{"step": "1", "files": {}}',
        '{"step": 1, "files": []}',
        '{"step": 1.5}',
    ],
)
def test_a_manifest_that_is_none_is_damaged(tmp_path: Path, content: str) -> None:
    (tmp_path / "checkpoint.json").write_text(content)
    with pytest.raises(manifest.Damaged, match=r"checkpoint\.json: "):
        manifest.read_manifest(tmp_path)
    (line,) = manifest.damage(tmp_path)
    assert line.startswith(str(tmp_path / "checkpoint.json"))


def asks_for(module: str, name: str, argument: str | None = None) -> bytes:
    """Return a pickle that looks `name` up in `module`, and calls it if there is an argument."""
    words = [pickle.SHORT_BINUNICODE + bytes([len(w)]) + w.encode() for w in (module, name)]
    call = b""
    if argument is not None:
        call = pickle.SHORT_BINUNICODE + bytes([len(argument)]) + argument.encode() + pickle.TUPLE1 + pickle.REDUCE
    return b"\x80\x04" + b"".join(words) + pickle.STACK_GLOBAL + call + pickle.STOP


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch.distributed.checkpoint.metadata", "Metadata.__init__"),
        ("torch.distributed.checkpoint.filesystem", "os"),
        ("torch.distributed.checkpoint.filesystem", "FileSystemWriter"),
        ("torch.distributed.checkpoint.metadata.x", "os"),
        ("torch.serialization", "load"),
        ("torch", "load"),
        ("torch", "hub"),
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("builtins", "exec"),
        ("pathlib", "Path"),
        ("collections", "namedtuple"),
    ],
)
def test_an_index_gets_nothing_but_its_own_records(tmp_path: Path, module: str, name: str) -> None:
    marker = tmp_path / "it_ran"
    with pytest.raises(
        pickle.UnpicklingError, match=rf"asks for {re.escape(module)}\.{re.escape(name)}: it is not one"
    ):
        read_index(asks_for(module, name, f"touch {marker}"))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        ("torch", "bfloat16"),
        ("pathlib", "PosixPath"),
        ("collections", "OrderedDict"),
    ],
)
def test_an_index_gets_its_own_records(module: str, name: str) -> None:
    found = Inert(asks_for(module, name)).load()
    assert issubclass(found, Record) and found.name == name  # what stands for it, never the thing itself


class Attribute:
    """What is pickled as Python 3.11.0 to 3.11.3 pickle an enum's member: the attribute of this name."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (getattr, self.arguments)


def test_every_python_pickles_an_index_that_can_be_read(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

    for encoding in (*_MEM_FORMAT_ENCODING, Attribute(_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT")):
        found = Inert(pickle.dumps(encoding)).load()
        assert isinstance(found, Record)
    reached = Attribute(Attribute(_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT"), "__globals__")
    assert type(Inert(pickle.dumps(reached)).load()).name == "getattr"  # it was not called


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("this must not run",))


def test_a_checkpoint_runs_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = whole(tmp_path)
    (path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(pickle.UnpicklingError, match=r"builtins\.print"):
        manifest.Reader(path).read_metadata()
    evil = tmp_path / "evil.json"
    evil.write_text(json.dumps({}))
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.checkpoint.state_dict_saver import save

    save({"x": Evil()}, checkpoint_id=str(tmp_path / "evil"), no_dist=True)
    with pytest.raises(BaseException, match=r"Weights only load failed|weights_only"):
        reader = manifest.Reader(tmp_path / "evil")
        load({"x": ""}, storage_reader=reader, planner=manifest.Planner(), no_dist=True)
    assert "this must not run" not in capsys.readouterr().out
