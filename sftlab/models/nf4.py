"""NF4: frozen linear layers whose weights are kept in 4 bits (NormalFloat 4), quantised by bitsandbytes.

Each row of a weight is one row of bytes: two numbers to a byte, then the largest magnitude of each block of 64 numbers
as a float32. So FSDP shards a layer by its outputs like any other, each rank quantises only the rows that it keeps, and
nothing about a weight lies outside of its parameter. bitsandbytes' own `Params4bit` keeps one long column of bytes and
the magnitudes apart from it, whole on every rank; it is quantised whole, and must be on the device to be.
The numbers are those of bitsandbytes without double quantisation. Source: https://arxiv.org/abs/2305.14314.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BLOCK = 64  # numbers that share a magnitude


class NF4Linear(nn.Linear):
    """A frozen linear layer whose weight (out, in) is kept as `codes` (out, in / 2 + in / 16) of bytes.

    It is a Linear, so that peft puts adapters beside it.
    """

    codes: nn.Parameter

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        width = self.in_features // 2 + 4 * self.in_features // BLOCK
        codes = torch.empty(self.out_features, width, dtype=torch.uint8, device=linear.weight.device)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight in float32."""
        return decode(self.codes, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs; nothing of the whole weight is kept for backward."""
        y: Tensor = FrozenLinear.apply(x, self.codes)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


class FrozenLinear(torch.autograd.Function):
    """x @ weight.T with the weight decoded in forward and again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor) -> Tensor:
        """Return the product in the dtype of `x`."""
        ctx.save_for_backward(codes)
        return F.linear(x, decode(codes, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Return the gradient of `x`."""
        (codes,) = ctx.saved_tensors
        return gradient @ decode(codes, gradient.dtype), None


def num_weights(parameter: Tensor) -> int:
    """Return how many numbers a parameter stands for. Only a weight in 4 bits is made of bytes."""
    return parameter.numel() * 16 // 9 if parameter.dtype == torch.uint8 else parameter.numel()


def encode(weight: Tensor) -> Tensor:
    """Return rows of a weight (rows, in) as bytes (rows, in / 2 + in / 16)."""
    from bitsandbytes.functional import quantize_4bit

    rows, width = weight.shape
    packed, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
    scales = state.absmax.float().view(rows, width // BLOCK)
    return torch.cat([packed.view(rows, width // 2), scales.contiguous().view(torch.uint8)], dim=1)


def decode(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight (rows, in) that bytes (rows, in / 2 + in / 16) stand for."""
    import bitsandbytes  # noqa: F401  it registers the operator

    rows, width = codes.shape[0], codes.shape[1] * 16 // 9
    packed, scales = codes[:, : width // 2], codes[:, width // 2 :]
    absmax = scales.contiguous().view(torch.float32).flatten()
    found: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        packed.contiguous().view(-1, 1), absmax, BLOCK, "nf4", (rows, width), dtype
    )
    return found


@torch.no_grad()
def rounded(model: nn.Module) -> None:
    """Give a loaded model's linear layers the values that they have in 4 bits, all but the head, in place."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            module.weight.copy_(decode(encode(module.weight.float()), torch.float32))


def quantize(model: nn.Module) -> None:
    """Replace a model's linear layers by ones in 4 bits, all but the head, which every prediction goes through.

    Raises: ValueError for a layer whose inputs are no whole number of blocks.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or module is head:
            continue
        if module.in_features % BLOCK:
            raise ValueError(
                f"peft.quantize=nf4: {name} has {module.in_features} inputs, and a block of NF4 has {BLOCK}. Use "
                "peft.quantize=none"
            )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, NF4Linear(module))
