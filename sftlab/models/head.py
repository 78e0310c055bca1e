"""The head and its loss in one function, so that the logits of all predictions never exist at once.

Autograd would keep the float32 logits of every prediction until backward, or make them twice. The gradient of a
cross-entropy is known as soon as its logits are, so the forward makes the gradients of the hidden states and of the
head's weight chunk by chunk, and backward only scales them. experiments/head compares this with torch's
`linear_cross_entropy`, with Liger's kernel and with recomputation.
Source: the method is Liger's fused linear cross-entropy, https://arxiv.org/abs/2410.10989; prediction weights, the
float32 sum of the head's gradient, logit scales and caps are ours.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor


class Vocabulary(NamedTuple):
    """The part of the vocabulary whose logits this rank has: it begins at `begin`, and `group` has the other parts."""

    begin: int
    group: dist.ProcessGroup

    def joined(self, normalizer: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normalizers over the whole vocabulary, and the targets' logits, which one rank each has.

        Shapes: (p, 1) each. `own` is 0 on the other ranks. One exchange of two numbers per prediction.
        """
        both = torch.cat([normalizer, own], -1)
        parts = both.new_empty(self.group.size() * len(both), 2)
        dist.all_gather_into_tensor(parts, both, group=self.group)
        normalizers, owned = parts.view(-1, len(both), 2).unbind(-1)
        return normalizers.logsumexp(0)[:, None], owned.sum(0)[:, None]

    def summed(self, value: Tensor) -> Tensor:
        """Return the sum of the ranks' values, in place."""
        dist.all_reduce(value, group=self.group)
        return value


def own_part(head: nn.Linear) -> tuple[Tensor, Tensor | None, Vocabulary | None]:
    """Return a head's weight and bias as this rank has them, and which part of the vocabulary that is; None if all."""
    weight, bias = head.weight, head.bias
    if not isinstance(weight, DTensor):
        return weight, bias, None
    mesh = weight.device_mesh
    rows = weight.to_local()
    vocabulary = Vocabulary(len(rows) * mesh.get_local_rank(), mesh.get_group())
    return rows, bias.to_local() if isinstance(bias, DTensor) else bias, vocabulary


class PredictionLoss(nn.Module):
    """The loss of some predictions from the head's output, and its gradient; compiled where the blocks are.

    The model's own forward scales its logits by `scale`, then caps them at `cap`: `cap * tanh(logits / cap)`.
    """

    def __init__(self, scale: float = 1.0, cap: float | None = None) -> None:
        super().__init__()
        self.scale = scale
        self.cap = cap

    def logits(self, output: Tensor) -> Tensor:
        """Return the model's logits from its head's output, in float32 or better."""
        if self.scale != 1.0:
            output = output * self.scale
        if self.cap is not None:
            output = torch.tanh(output / self.cap) * self.cap
        return output.to(torch.promote_types(output.dtype, torch.float32))

    def forward(
        self, output: Tensor, target: Tensor, weight: Tensor, vocabulary: Vocabulary | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the sum of weight * nll, and its gradient with respect to `output`.

        Shapes: output (p, vocabulary or its part here), target and weight (p,); the gradient is like `output`.
        """
        logits = self.logits(output)
        normalizer = logits.logsumexp(-1, keepdim=True)
        if vocabulary is None:
            own = logits.gather(-1, target[:, None])
        else:
            target = target - vocabulary.begin  # outside of 0 to the width, if another rank has it
            here = (target >= 0) & (target < logits.shape[-1])
            target = target.where(here, 0)
            normalizer, own = vocabulary.joined(normalizer, logits.gather(-1, target[:, None]) * here[:, None])
        nll = normalizer - own
        if vocabulary is not None:
            gradient = torch.exp(logits - normalizer)
            gradient = gradient.scatter_add(-1, target[:, None], -here[:, None].to(gradient.dtype))
        elif torch.compiler.is_compiling():  # one kernel; a scatter would write all logits to memory once more
            gradient = torch.exp(logits - normalizer)
            # in 32 bits: a GPU has no 64-bit arithmetic, and this is done for every logit
            index = torch.arange(logits.shape[-1], device=logits.device, dtype=torch.int32)
            gradient = gradient - (index == target[:, None].to(torch.int32)).to(nll.dtype)
        else:
            gradient = torch.sub(logits, normalizer).exp_()
            gradient.scatter_add_(-1, target[:, None], torch.full_like(nll, -1.0))
        gradient *= weight[:, None] * self.scale
        if self.cap is not None:
            gradient *= 1 - (logits / self.cap).square()
        return (weight * nll[:, 0]).sum(), gradient.to(output.dtype)


class FusedLoss(torch.autograd.Function):
    """The sum of weight * nll of predictions through a linear head, whose gradients are made in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        target: Tensor,
        weight: Tensor,
        loss: PredictionLoss,
        chunk: int,
        vocabulary: Vocabulary | None = None,
    ) -> Tensor:
        """Return the loss. Shapes: hidden (P, width), head (vocabulary or its part, width), target and weight (P,).

        The gradient of the head is summed over chunks in float32. Summed in the bfloat16 that FSDP computes in, the
        gradient of 64 chunks was 1.6 % off. In float32 it is 0.4 % off, as without chunks.
        """
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=wide)
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_head: Tensor | None = None
        of_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and ctx.needs_input_grad[2] else None
        for part in chunks(len(hidden), chunk):
            some = hidden[part]
            output = torch.nn.functional.linear(some, head, bias)
            nll, gradient = loss(output, target[part], weight[part], vocabulary)
            total += nll
            if of_hidden is not None:
                torch.mm(gradient, head, out=of_hidden[part])
            if ctx.needs_input_grad[1]:
                of_head = with_product(of_head, gradient.T, some, wide)
            if of_bias is not None:
                of_bias += gradient.sum(0, dtype=wide)
        if vocabulary is not None and of_hidden is not None:
            vocabulary.summed(of_hidden)  # each rank's logits ask for a part of it
        ctx.save_for_backward(of_hidden, of_head, of_bias)
        ctx.dtype = head.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> Any:
        """Scale the gradients that the forward made. In place, because the head's is as large as the head."""
        of_hidden, of_head, of_bias = ctx.saved_tensors
        of_hidden = None if of_hidden is None else of_hidden.mul_(scale)
        of_head, of_bias = (None if g is None else g.mul_(scale).to(ctx.dtype) for g in (of_head, of_bias))
        return of_hidden, of_head, of_bias, None, None, None, None, None


def with_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return total + a @ b in `dtype`, in place. On a CPU a narrower product is rounded before it is added."""
    if a.is_cuda and dtype == torch.float32 != a.dtype:
        if total is None:
            return torch.mm(a, b, out_dtype=dtype)
        return torch.addmm(total, a, b, out_dtype=dtype, out=total)
    if total is None:
        return (a @ b).to(dtype)
    return total.addmm_(a, b) if dtype == a.dtype else total.add_(a @ b)


def chunks(num: int, most: int) -> Iterator[slice]:
    """Yield slices of like length, at most `most`, that cover `num`: torch compiles a length of 1 on its own."""
    parts = max(1, -(-num // most))
    bounds = [num * i // parts for i in range(parts + 1)]
    return (slice(begin, end) for begin, end in pairwise(bounds))
