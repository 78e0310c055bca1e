"""GPUs that cannot be used: each error says what was found and which setting works."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sftlab.models.load import Model
from sftlab.parallel import device
from sftlab.parallel.device import require_one_process_per_gpu, require_visible, settle
from sftlab.parallel.fsdp2 import compute_dtype
from sftlab.training import sharded_model
from sftlab.training.faults import OutOfMemory, memory_for

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pretend that a GPU's device file is here."""
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(device, "NVIDIA", tmp_path / "nvidia0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path / "nvidia0"


def test_a_gpu_that_torch_cannot_see_is_no_reason_to_train_on_the_cpu(
    gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ValueError, match=r"nvidia0 is here, but this torch .* was built without CUDA\. Install"):
        require_visible()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ValueError, match=r"needs a driver for CUDA 13\.0 and finds none that works.*Update the driver"):
        require_visible()
    with pytest.raises(ValueError, match=r"To train on the CPU, set CUDA_VISIBLE_DEVICES= \(to nothing\)"):
        require_visible()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(ValueError, match="nvidia0 is here"):
        require_visible()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    require_visible()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    gpu.unlink()
    require_visible()


def test_two_processes_on_one_gpu_are_told_how_many_there_may_be() -> None:
    require_one_process_per_gpu([("a", "1"), ("a", "2"), ("b", "1"), ("b", "2")])
    with pytest.raises(
        ValueError,
        match=r"^ranks 1 and 3 would share GPU 2 of a: .*Start 2 there \(launcher\.processes_per_node=2, or torchrun "
        r"--nproc-per-node 2\)$",
    ):
        require_one_process_per_gpu([("b", "2"), ("a", "2"), ("a", "1"), ("a", "2")])


def test_a_gpu_without_bfloat16_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert compute_dtype("auto", CUDA) == compute_dtype("float32", CUDA) == torch.float32
    with pytest.raises(ValueError, match=r"=bfloat16: Tesla T4 has no bfloat16\. Use auto or float32$"):
        compute_dtype("bfloat16", CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert compute_dtype("auto", CUDA) == compute_dtype("bfloat16", CUDA) == torch.bfloat16
    assert compute_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16


def test_without_triton_nothing_is_compiled_and_attention_is_sdpas(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    monkeypatch.setattr(sharded_model, "has_triton", lambda: False)
    assert Model(str(model_folder)).load_config(CUDA)._attn_implementation == "sdpa"
    said = r"attention=flex is impossible for llama on cuda: .* needs Triton \(pip install triton\).*or sdpa or eager$"
    with pytest.raises(ValueError, match=said):
        Model(str(model_folder), attention="flex").load_config(CUDA)
    with pytest.raises(ValueError, match=r"trainer\.compile=true needs Triton .* Use trainer\.compile=auto or false$"):
        sharded_model.compiles(True, CUDA)


@pytest.mark.parametrize(("held_gib", "said"), [(30, True), (0.5, False)])
def test_out_of_memory_says_what_other_processes_hold(
    held_gib: float, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 40 * gib)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int((39 - held_gib) * gib), 79 * gib))
    tokens: Any = SimpleNamespace(shape=(1, 4096), device=CUDA)
    batch: Any = SimpleNamespace(tokens=tokens, at=[0] * 7)
    with pytest.raises(OutOfMemory) as raised, memory_for(batch):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert "1 rows of 4096 tokens, 7 predictions. Lower trainer.rows_per_microbatch" in str(raised.value)
    expected = "Other processes hold 30.0 of this GPU's 79.0 GiB (nvidia-smi lists them): choose a free GPU"
    assert (expected in str(raised.value)) == said


def test_compiled_code_is_kept_at_home_where_a_second_start_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "PYTORCH_CUDA_ALLOC_CONF", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    settle()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / ".cache/sftlab/inductor")
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:native")
    settle()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/mine"
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "backend:native"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settle()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "cache/sftlab/inductor")
