"""A checkpoint folder is whole or the file that is not is named; what is in it is never run."""

import io
import json
import pickle
from pathlib import Path

import pytest
import torch

from sftlab.checkpoints import manifest


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
    assert complete_checkpoints(tmp_path) == [path]


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
    assert complete_checkpoints(tmp_path) == []


def test_a_file_shorter_than_its_tensors_completes_no_checkpoint(tmp_path: Path) -> None:
    path = whole(tmp_path)
    (path / manifest.NAME).unlink()
    shard = path / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(manifest.Damaged, match=r"__0_0\.distcp has"):
        manifest.write_manifest(path, {"step": 1}, manifest.sizes_and_checksums(path, ["__0_0.distcp", ".metadata"]))
    assert not (path / manifest.NAME).exists()


class Attribute:
    """What is pickled as Python 3.11.0 to 3.11.3 pickle an enum's member: the attribute of this name."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (getattr, self.arguments)


def test_every_python_pickles_an_index_that_can_be_read(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

    def read(what: object) -> object:
        return manifest.RecordsOnly(io.BytesIO(pickle.dumps(what))).load()

    for encoding in _MEM_FORMAT_ENCODING:
        assert read(encoding) is encoding
        assert read(Attribute(_MEM_FORMAT_ENCODING, encoding.name)) is encoding
    with pytest.raises(pickle.UnpicklingError, match="__globals__ of"):
        read(Attribute(Attribute(_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT"), "__globals__"))
    with pytest.raises(KeyError):
        read(Attribute(_MEM_FORMAT_ENCODING, "__class__"))


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
