"""Time and memory of ways to score predictions: forward and backward through the head. See README.md."""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sftlab.models.head import FusedLoss, PredictionLoss, chunks

Score = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def at_once(hidden: Tensor, head: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return (weight * F.cross_entropy(F.linear(hidden, head).float(), target, reduction="none")).sum()


def recomputed(hidden: Tensor, head: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    parts = chunks(len(hidden), 2048)
    return torch.stack([
        checkpoint(at_once, hidden[p], head, target[p], weight[p], use_reentrant=False) for p in parts
    ]).sum()  # fmt: skip


def fused(hidden: Tensor, head: Tensor, target: Tensor, weight: Tensor, loss: nn.Module | None = None) -> Tensor:
    return FusedLoss.apply(hidden, head, None, target, weight, loss or PredictionLoss(), 2048)


def torchs(hidden: Tensor, head: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """torch's own knows weights of classes, not of predictions, so it computes a sum without weights."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, head, target, reduction="sum", options=options)


def ligers(hidden: Tensor, head: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

    return Liger.apply(hidden, head, target, None, None, -100, 0.0, 0.0, "sum")[0]


def chosen(name: str) -> Score:
    if name == "fused, compiled":
        loss = PredictionLoss()
        loss.compile(dynamic=True)
        return lambda *given: fused(*given, loss)
    return {"at once": at_once, "recomputed": recomputed, "fused": fused, "torch": torchs, "Liger": ligers}[name]


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    torch.manual_seed(0)
    hidden = torch.randn(args.predictions, args.width, device=device, dtype=dtype, requires_grad=True)
    head = (0.02 * torch.randn(args.vocabulary, args.width, device=device)).to(dtype).requires_grad_()
    target = torch.randint(args.vocabulary, (args.predictions,), device=device)
    weight = torch.ones(args.predictions, device=device)
    score, spent = chosen(name), []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for _ in range(args.repeats + 1):
        hidden.grad = head.grad = None
        if cuda:
            torch.cuda.synchronize()
        began_s = time.perf_counter()
        loss = score(hidden, head, target, weight)
        loss.backward()
        if cuda:
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - began_s)
    peak = (
        torch.cuda.max_memory_allocated()
        if cuda
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    )
    return {
        "name": name, "ms": 1e3 * statistics.median(spent[1:]), "first_s": spent[0], "peak_gib": peak / 2**30,
        "loss": float(loss.detach()), "head_gradient": float(head.grad.float().norm()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--predictions", type=int, default=8192)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", help="measure this one here, and print JSON")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args)))
        return
    sizes = [f"--{key}={getattr(args, key)}" for key in ("predictions", "width", "vocabulary", "repeats")]
    print("| way | ms | first call, s | peak GiB | loss | norm of the head's gradient |\n|---|---|---|---|---|---|")
    for name in ("at once", "recomputed", "fused", "fused, compiled", "torch", "Liger"):  # each in a fresh process
        done = subprocess.run([sys.executable, __file__, *sizes, f"--only={name}"], capture_output=True, text=True)
        if done.returncode:
            print(f"| {name} | {done.stderr.strip().splitlines()[-1]} |")
            continue
        r = json.loads(done.stdout.splitlines()[-1])
        print(f"| {name} | {r['ms']:.0f} | {r['first_s']:.1f} | {r['peak_gib']:.2f} | {r['loss']:.2f} | "
              f"{r['head_gradient']:.4f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
