"""What computes: Python, torch, the GPU with its driver, NCCL, bfloat16, Triton, FlexAttention, the compiler."""

import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

from sftlab.health.finding import Answer

OLDEST, NEWEST = (3, 11), (3, 13)
TOKENS, HEADS, DIM = 256, 2, 64
TOLERANCE = 2e-2  # bfloat16 against float32


def python() -> Answer:
    """Return whether this Python is one that sftlab runs on."""
    here = platform.python_version()
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        return "fail", f"{here}: install Python 3.11 to 3.13 (uv venv --python 3.12)"
    return "ok", f"{here}, {sys.executable}"


def torch_itself() -> Answer:
    """Return the versions of torch and transformers."""
    import torch

    return "ok", f"torch {torch.__version__}, transformers {metadata.version('transformers')}"


def smi() -> list[list[str]]:
    """Return name, driver and memory of each GPU that the driver knows; none without a driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    ask = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    done = subprocess.run(ask, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise RuntimeError(f"nvidia-smi fails: {(done.stderr or done.stdout).strip()}")
    return [[part.strip() for part in row.split(",")] for row in done.stdout.splitlines() if row.strip()]


def driver() -> Answer:
    """Return which GPUs the driver knows."""
    gpus = smi()
    if not gpus:
        return "note", "no NVIDIA driver: runs train on the CPU. With a GPU in this machine, install its driver"
    return "ok", f"{gpus[0][1]}; " + ", ".join(f"{name} {memory}" for name, _, memory in gpus)


def cuda() -> Answer:
    """Return whether torch sees the GPUs that the driver knows."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return "ok", f"CUDA {torch.version.cuda}; {len(names)} x {names[0]}"
    if not smi():
        return "note", "no GPU"
    if torch.version.cuda is None:
        return "fail", "there is a GPU, and this torch was built without CUDA: pip install --force-reinstall torch"
    return "fail", f"no GPU for CUDA {torch.version.cuda}: update the driver, or see CUDA_VISIBLE_DEVICES"


def nccl() -> Answer:
    """Return whether ranks can talk: NCCL between GPUs, gloo otherwise."""
    import torch
    import torch.distributed as dist

    if not torch.cuda.is_available():
        return ("ok", "gloo, for processes on CPUs") if dist.is_gloo_available() else ("fail", "this torch has no gloo")
    if not dist.is_nccl_available():
        return "fail", "this torch has no NCCL: several GPUs cannot train together. Install torch from PyPI"
    nccl: Any = torch.cuda.nccl
    version = ".".join(map(str, nccl.version()))
    count = torch.cuda.device_count()
    lonely = [i for i in range(1, count) if not torch.cuda.can_device_access_peer(0, i)]
    slow = f"; GPU 0 reaches {lonely} through the host only: several GPUs are slower" if lonely else ""
    return ("note" if lonely else "ok"), f"NCCL {version}, {count} GPUs{slow}"


def bfloat16() -> Answer:
    """Return whether the device computes in bfloat16."""
    import torch

    from sftlab.parallel.device import has_bfloat16

    if not torch.cuda.is_available():
        return "ok", "float32 on a CPU (parallel.param_dtype=auto)"
    if has_bfloat16(torch.device("cuda", 0)):
        return "ok", "native"
    return "note", "this GPU only emulates it: runs compute in float32 (parallel.param_dtype=auto)"


def triton() -> Answer:
    """Return whether Triton is there, without which nothing is compiled for a GPU."""
    import torch
    from torch.utils._triton import has_triton

    if has_triton():
        return "ok", metadata.version("triton")
    if torch.cuda.is_available():
        return "fail", "not installed, so nothing is compiled and runs are several times slower: pip install triton"
    return "note", "not there, and not needed on a CPU"


def flex() -> Answer:
    """Return whether FlexAttention, compiled, has the forward and the backward of plain attention."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from torch.utils._triton import has_triton

    if not (torch.cuda.is_available() and has_triton()):
        return "note", "not used here: rows are computed by SDPA"
    shape = (1, HEADS, TOKENS, DIM)
    first: list[Any] = [torch.randn(shape, device="cuda", requires_grad=True) for _ in range(3)]
    second: list[Any] = [t.detach().clone().requires_grad_() for t in first]
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, TOKENS, TOKENS, device="cuda")
    attention: Any = torch.compile(flex_attention)
    ours = attention(*first, block_mask=mask)
    plain = torch.nn.functional.scaled_dot_product_attention(second[0], second[1], second[2], is_causal=True)
    for out in (ours, plain):
        out.square().sum().backward()
    forward = float((ours - plain).abs().max())
    backward = max(float((a.grad - b.grad).abs().max()) for a, b in zip(first, second, strict=True))
    if max(forward, backward) > TOLERANCE:
        return "fail", f"differs from SDPA by {forward:.1e} and {backward:.1e} (backward): set model.attention=sdpa"
    return "ok", f"forward and backward equal SDPA's (to {max(forward, backward):.0e})"


def compiler() -> Answer:
    """Return whether torch.compile works on the device that runs use; on a CPU whether it would find a compiler."""
    import torch

    if not torch.cuda.is_available():
        found = next((name for name in ("g++", "clang++") if shutil.which(name)), None)
        if found:
            return "ok", f"{found}; trainer.compile=auto compiles nothing on a CPU"
        return "note", "no C++ compiler: trainer.compile=true would fail on this CPU (apt-get install g++)"
    x = torch.randn(64, 64, device="cuda")
    product: Any = lambda t: torch.nn.functional.silu(t) @ t  # noqa: E731
    compiled: Any = torch.compile(product)
    difference = float((compiled(x) - product(x)).abs().max())
    return (
        ("ok", "a function was compiled and is right") if difference < 1e-2 else ("fail", f"wrong by {difference:.1e}")
    )


CHECKS: dict[str, Callable[[], Answer]] = {
    "python": python,
    "torch": torch_itself,
    "driver": driver,
    "cuda": cuda,
    "nccl": nccl,
    "bfloat16": bfloat16,
    "triton": triton,
    "flex": flex,
    "compile": compiler,
}
