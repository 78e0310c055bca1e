"""Attention by itself, forward and backward, on one machine: which block sizes, which kernel.

    python -m experiments.gpu.attention [--tiny] [--out FILE] [--budget SECONDS]

16,384 tokens with the heads of Llama 3.2 1B, as full rows (documents of 4,096 tokens) and as a forest of SQuAD's sizes:
FlexAttention compiled for one length and for all, with several block sizes, on heads that lie token by token (as in a
model) or one after another; and full rows through torch's own causal kernels too. Every variant is compared with the
first and timed by device events, the median of 10.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sftlab.models import flex

QUERY_HEADS, KEY_HEADS, HEAD_DIM, DOCUMENT = 32, 8, 64, 4096
SAFE = {"ROWS_GUARANTEED_SAFE": True}  # every token sees itself
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def backward(m1: int, n1: int, warps: int, stages: int) -> dict[str, Any]:
    """Return kernel options for the backward alone; the second product's blocks are the first's, turned."""
    sizes = {"bwd_BLOCK_M1": m1, "bwd_BLOCK_N1": n1, "bwd_BLOCK_M2": n1, "bwd_BLOCK_N2": m1}
    return {**SAFE, **sizes, "bwd_num_warps": warps, "bwd_num_stages": stages}


OPTIONS: dict[str, dict[str, Any]] = {
    "code for this length": {},
    "safe rows": SAFE,
    "backward 64 x 64, 4 warps": backward(64, 64, 4, 3),
    "backward 64 x 128, 4 warps": backward(64, 128, 4, 2),
    "backward 128 x 128, 8 warps": backward(128, 128, 8, 2),
    "backward 32 x 64, 4 warps": backward(32, 64, 4, 3),
    "forward 64 x 64": {**SAFE, "fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64},
    "forward 128 x 64": {**SAFE, "fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64},
}
KERNELS = {
    "sdpa, cudnn": [SDPBackend.CUDNN_ATTENTION],
    "sdpa, flash": [SDPBackend.FLASH_ATTENTION],
    "sdpa, torch's choice": [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ],
}


def full_rows(length: int, document: int) -> tuple[Tensor, Tensor]:
    """Return reach and position of documents laid end to end, (1, T) each."""
    index = torch.arange(length)
    return ((index // document + 1) * document)[None], (index % document)[None]


def questions(length: int) -> tuple[Tensor, Tensor]:
    """Return reach and position of contexts of about 150 tokens, each with five questions of about 20, (1, T) each."""
    rng = random.Random(0)
    reach, position = torch.arange(1, length + 1), torch.zeros(length, dtype=torch.long)
    at = 0
    while at < length:
        context = rng.randint(100, 200)
        lengths = [rng.randint(12, 30) for _ in range(5)]
        end = min(at + context + sum(lengths), length)
        reach[at : at + context] = end
        position[at : at + context] = torch.arange(min(context, length - at))
        branch = at + context
        for n in lengths:
            last = min(branch + n, length)
            if branch < last:
                reach[branch:last] = last
                position[branch:last] = torch.arange(context, context + last - branch)
            branch += n
        at = end
    return reach[None], position[None]


# Compiled for all lengths, and with the kernel told that they are whole blocks.
LENGTHS: dict[str, tuple[bool, dict[str, Any]]] = {
    "code for all lengths": (True, {}),
    "code for all lengths, told of whole blocks (as shipped)": (True, {"IS_DIVISIBLE": True}),
}


def through_flex(mask: BlockMask, options: dict[str, Any], dynamic: bool = False) -> Attend:
    """Return FlexAttention, compiled for this length or for all, with these kernel options."""
    compiled: Any = torch.compile(flex_attention, dynamic=dynamic)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True, kernel_options=options)


def through_sdpa(document: int, backends: list[SDPBackend], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return plain causal attention with each document as a row."""

    def rows(t: Tensor) -> Tensor:
        return t.view(t.shape[1], -1, document, HEAD_DIM).transpose(0, 1)

    with sdpa_kernel(backends, set_priority=True):
        out = F.scaled_dot_product_attention(rows(q), rows(k), rows(v), is_causal=True, enable_gqa=True)
    return out.transpose(0, 1).reshape(q.shape)


def times_ms(act: Callable[[], Any], device: str, rounds: int) -> float:
    """Return the median of the milliseconds that a call takes on the device."""
    found = []
    for _ in range(rounds):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            act()
            end.record()
            torch.cuda.synchronize()
            found.append(begin.elapsed_time(end))
        else:
            began_s = time.perf_counter()
            act()
            found.append(1000 * (time.perf_counter() - began_s))
    return statistics.median(found)


def by_token(attend: Attend) -> Attend:
    """Return a variant that gets its heads token by token, as a model's projections make them."""

    def laid_out(t: Tensor) -> Tensor:
        return t.transpose(1, 2).contiguous().transpose(1, 2)

    return lambda q, k, v: attend(laid_out(q), laid_out(k), laid_out(v))


def measure(attend: Attend, length: int, device: str, rounds: int) -> tuple[dict[str, float], list[Tensor]]:
    """Return the times of one variant, and its output and gradients."""
    made = torch.Generator(device).manual_seed(0)
    like = {"device": device, "dtype": torch.bfloat16, "generator": made}
    q, k, v, up = (
        torch.randn(1, heads, length, HEAD_DIM, **like)  # type: ignore[call-overload]
        for heads in (QUERY_HEADS, KEY_HEADS, KEY_HEADS, QUERY_HEADS)
    )
    if device == "cpu":  # FlexAttention has no backward there
        return {"forward_ms": times_ms(lambda: attend(q, k, v), device, rounds)}, [attend(q, k, v)]
    for t in (q, k, v):
        t.requires_grad_()
    began_s = time.perf_counter()
    out = attend(q, k, v)
    gradients = torch.autograd.grad(out, (q, k, v), up)
    torch.cuda.synchronize()
    first_s = time.perf_counter() - began_s
    forward_ms = times_ms(lambda: attend(q, k, v), device, rounds)
    both_ms = times_ms(lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), up), device, rounds)
    found = {"forward_ms": forward_ms, "backward_ms": both_ms - forward_ms, "first_s": first_s}
    return found, [t.detach() for t in (out, *gradients)]


def apart(found: list[Tensor], reference: list[Tensor]) -> float:
    """Return the largest relative difference, of the output and each gradient."""
    pairs = zip(found, reference, strict=True)
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)


def main() -> None:
    """Entry point."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--tiny", action="store_true")
    made.add_argument("--out", type=Path)
    made.add_argument("--budget", type=float, default=90.0, help="seconds; variants after them are left out, and named")
    given = made.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    length, document, rounds = (512, 256, 1) if given.tiny else (4 * DOCUMENT, DOCUMENT, 10)
    began_s, results = time.monotonic(), {}
    cases = {"full rows": full_rows(length, document), "questions": questions(length)}
    masks = {
        case: flex.block_mask(reach.to(device, torch.int32), position.to(device, torch.int32))
        for case, (reach, position) in cases.items()
    }
    variants: list[tuple[str, str, Attend]] = []
    for name, options in OPTIONS.items():
        variants += [(case, name, through_flex(mask, options)) for case, mask in masks.items()]
        if not options:
            for kind, (dynamic, told) in LENGTHS.items():
                variants += [(case, kind, through_flex(mask, told, dynamic)) for case, mask in masks.items()]
            laid_out = "heads token by token (with three copies)"
            variants += [(case, laid_out, by_token(through_flex(mask, {}))) for case, mask in masks.items()]
            variants += [("full rows", k, partial(through_sdpa, document, backends)) for k, backends in KERNELS.items()]
    references: dict[str, list[Tensor]] = {}
    for case, name, attend in variants:
        if time.monotonic() - began_s > given.budget:
            print(f"{case}, {name}: left out, {given.budget:.0f} s are over", flush=True)
            continue
        torch._dynamo.reset()
        try:
            found, values = measure(attend, length, device, rounds)
        except Exception as error:  # a kernel that this machine or version does not have
            print(f"{case}, {name}: {type(error).__name__}: {str(error).splitlines()[0][:200]}", flush=True)
            continue
        found["apart"] = apart(values, references.setdefault(case, values))
        results[f"{case}, {name}"] = found
        print(f"{case}, {name}: " + ", ".join(f"{k} {v:.3g}" for k, v in found.items()), flush=True)
    if given.out:
        given.out.write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
