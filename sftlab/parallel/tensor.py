"""Tensor parallel: the matrices of a layer are split over the ranks of a group, by the plan that transformers has.

A plan names modules and how each is split: `colwise` by output features (heads of attention), `rowwise` by input
features, after which the ranks' parts are summed. The words are translated to torch's own styles. The embedding and
the head are split over the vocabulary (models/head.py scores with it). Everything else is whole on every rank: its
parameters are DTensors too, because one fused optimiser takes parameters of one mesh only.
Source: Megatron-LM, https://arxiv.org/abs/1909.08053; the plans are transformers' `base_model_tp_plan`.
"""

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from sftlab.models.scorer import Scorer

WITHOUT = "Use parallel=fsdp2, or parallel=hsdp with whole copies on each node"
# Styles by transformers' words. A module of the last one is whole, and each rank runs it on its own heads.
COLUMNS, ROWS, GATHERED, OWN_HEADS = "colwise", "rowwise", "colwise_gather_output", "replicated_with_grad_allreduce"


def require_plan(config: Any, tensor: int) -> dict[str, str]:
    """Return the tensor parallel plan of a model's config: {pattern of a module's name in the body: style}.

    Raises: ValueError if there is none, it has a style that is not known here, or a size does not divide by `tensor`.
    """
    from sftlab.models.architecture import in_layers

    text = config.get_text_config()
    plan = getattr(text, "base_model_tp_plan", None) or {}
    if not plan:
        raise ValueError(
            f"parallel.tensor={tensor}: transformers has no tensor parallel plan for models of type "
            f"{text.model_type}. {WITHOUT}"
        )
    if unknown := sorted(set(plan.values()) - {COLUMNS, ROWS, GATHERED, OWN_HEADS}):
        raise ValueError(
            f"parallel.tensor={tensor}: the plan of {text.model_type} splits modules in ways that are not supported "
            f"here ({', '.join(unknown)}). {WITHOUT}"
        )
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
    found = {name: [size for size in in_layers(text, name) if isinstance(size, int)] for name in names}
    sizes = {name: math.gcd(*layers) for name, layers in found.items() if layers}
    if odd := {name: size for name, size in sizes.items() if size % tensor}:
        works = [n for n in range(1, tensor) if not any(size % n for size in sizes.values())]
        words = ", ".join(f"{name} {size}" for name, size in odd.items())
        raise ValueError(
            f"parallel.tensor={tensor} does not divide {words} of {text.model_type}: use {' or '.join(map(str, works))}"
        )
    return dict(plan)


def split(scorer: "Scorer", mesh: "DeviceMesh") -> None:
    """Split a scorer's model in place over the ranks of a tensor group; every parameter becomes a DTensor on `mesh`."""
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    from sftlab.models.architecture import body

    model = scorer.model
    name_of = type(model).__name__
    plan = require_plan(model.config, mesh.size())
    torchs: dict[str, Any] = {
        COLUMNS: ColwiseParallel,
        ROWS: RowwiseParallel,
        GATHERED: lambda: ColwiseParallel(output_layouts=Replicate()),
    }
    for name, module in list(body(model).named_modules()):
        style = style_of(name, plan)
        if style == OWN_HEADS:
            whole(module, mesh, own_heads=True)
        elif style is not None:
            if not isinstance(module, nn.Linear):
                raise ValueError(
                    f"parallel.tensor={mesh.size()}: {name} of {name_of} is a {type(module).__name__}, and only plain "
                    f"linear layers can be split. {WITHOUT}"
                )
            parallelize_module(module, mesh, torchs[style](), src_data_rank=None)
    embedding = RowwiseParallel(input_layouts=Replicate())
    parallelize_module(model.get_input_embeddings(), mesh, embedding, src_data_rank=None)
    parallelize_module(model.get_output_embeddings(), mesh, torchs[GATHERED](), src_data_rank=None)
    for name, module in list(model.named_modules()):
        if any(not isinstance(p, DTensor) for p in module.parameters(recurse=False)):
            if next(module.children(), None) is not None:
                raise ValueError(
                    f"parallel.tensor={mesh.size()}: {name} of {name_of} has parameters of its own that its tensor "
                    f"parallel plan does not name. {WITHOUT}"
                )
            whole(module, mesh)
    model.tie_weights()  # a shared parameter was split twice


def style_of(name: str, plan: Mapping[str, str]) -> str | None:
    """Return the style that a plan has for a module; `*` stands for the number of a layer."""
    return next((style for pattern, style in plan.items() if fnmatchcase(name, pattern)), None)


def whole(module: nn.Module, mesh: "DeviceMesh", own_heads: bool = False) -> None:
    """Make a module's parameters DTensors that every rank holds whole, and let it run on plain tensors.

    With `own_heads` each rank gives it other activations, and gradients are summed over the group. Any dimension may be
    called the one that is split: nothing is sent, because the module computes each head by itself.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module

    placement = Shard(0) if own_heads else Replicate()

    def before(module: nn.Module, given: tuple[Any, ...], mesh: "DeviceMesh") -> tuple[Any, ...]:
        return (DTensor.from_local(given[0], mesh, [placement], run_check=False), *given[1:])

    def after(module: nn.Module, made: Any, mesh: "DeviceMesh") -> Any:
        return made.to_local()

    distribute_module(module, mesh, None, before, after)  # type: ignore[arg-type]
