"""The estimate of a run: memory of a rank and of a node, steps, operations, time, price and disk."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from sftlab.common.words import one_line
from sftlab.config.binding import check
from sftlab.estimating.amounts import Amounts, assumed_amounts, read_amounts
from sftlab.estimating.devices import GIB, Device, device_named
from sftlab.estimating.rehearsal import Rehearsal, Stage, rehearse
from sftlab.models.architecture import ATTENTIONS, causal_class
from sftlab.models.load import skeleton
from sftlab.models.scorer import Scorer
from sftlab.parallel.division import divide
from sftlab.parallel.fsdp2 import dtype_named
from sftlab.training.sharded_model import sharded
from sftlab.training.throughput import FlopCount

PROCESS_GIB = 1.0  # of Python, torch and transformers on the host, for each rank
EXPORT_GIB = 4.0  # what an export reads at a time, beside the model itself


@dataclass(frozen=True)
class Estimate:
    """What a run needs. Memory in bytes; numbers that nothing tells are None."""

    device: Device
    num_ranks: int
    num_nodes: int
    amounts: Amounts
    rehearsal: Rehearsal
    offloaded: bool
    steps: int | None
    step_flops: float | None
    mfu: float
    price_per_hour: float | None
    kept_checkpoints: int
    batch_size: int
    compute_bytes: int  # of one number in forward, backward and the exported model

    @property
    def parts(self) -> dict[str, float]:
        """Device memory of a rank by part, at the peak."""
        kept = ("parameters", "adapter", "gradients", "optimiser")
        return {k: 0.0 if self.offloaded and k in kept else v for k, v in self.rehearsal.parts.items()}

    @property
    def peak(self) -> float:
        """Device memory of a rank at the peak."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool | None:
        """Whether a rank's device has that; None for a CPU."""
        usable = self.device.usable_gib
        return None if usable is None else self.peak <= usable * GIB

    @property
    def checkpoint_bytes(self) -> float:
        """Size of a checkpoint: what is trained, and the optimiser's state, of all ranks."""
        return (self.rehearsal.trained_bytes + self.rehearsal.state_bytes) * self.num_ranks

    @property
    def model_bytes(self) -> float:
        """Size of the exported model, or adapter."""
        return float(self.rehearsal.num_trained * self.compute_bytes)

    @property
    def disk_bytes(self) -> float:
        """Disk for the checkpoints that are kept, the best, the one that is written, and the model."""
        return (self.kept_checkpoints + 2) * self.checkpoint_bytes + self.model_bytes

    @property
    def host_bytes(self) -> float:
        """Host memory of the first node: processes, copies of a checkpoint that is saved, what is offloaded, export.

        The export comes when nothing is saved any more, so the greater of both counts.
        """
        saved = self.rehearsal.trained_bytes + self.rehearsal.state_bytes
        each = PROCESS_GIB * GIB
        if self.offloaded:
            each += self.rehearsal.parameter_bytes + self.rehearsal.trained_bytes + self.rehearsal.state_bytes
        local = self.num_ranks // self.num_nodes
        return local * each + max(local * saved, self.model_bytes + EXPORT_GIB * GIB)

    @property
    def hours(self) -> float | None:
        """Hours of training at `mfu`."""
        if self.steps is None or self.step_flops is None or self.device.flops is None:
            return None
        return self.steps * self.step_flops / (self.mfu * self.device.flops * self.num_ranks) / 3600

    @property
    def price(self) -> float | None:
        """Price of these hours on all devices."""
        if self.hours is None or self.price_per_hour is None:
            return None
        return self.hours * self.num_ranks * self.price_per_hour

    def numbers(self) -> dict[str, Any]:
        """Return everything as plain values; memory in bytes."""
        a, r = self.amounts, self.rehearsal
        rows, length = a.batch.tokens.shape
        return {
            "device": asdict(self.device),
            "ranks": self.num_ranks,
            "parameters": r.num_parameters,
            "trained_parameters": r.num_trained,
            "peak_bytes": self.peak,
            "peak_phase": r.phase,
            "parts_bytes": self.parts,
            "phases_bytes": r.phases,
            "fits": self.fits,
            "host_bytes_per_node": self.host_bytes,
            "data": a.known_from,
            "examples": a.num_examples,
            "microbatch": {
                "rows": rows,
                "tokens": length,
                "predictions": len(a.batch.at),
                "number": a.num_microbatches,
            },
            "steps": self.steps,
            "tokens_per_step": a.tokens,
            "effective_tokens_per_step": a.effective_tokens,
            "flops_per_step": self.step_flops,
            "mfu": self.mfu,
            "hours": self.hours,
            "price": self.price,
            "checkpoint_bytes": self.checkpoint_bytes,
            "model_bytes": self.model_bytes,
            "disk_bytes": self.disk_bytes,
        }


def estimate_run(config: Mapping[str, Any], own: Mapping[str, Any]) -> Estimate:
    """Return the estimate of a run's config; `own` holds the keys under `estimate`.

    Raises: ValueError for a config that train would refuse, or a model whose step cannot be rehearsed.
    """
    device = device_named(own["device"])
    parts = check(config)
    num_nodes, num_ranks = ranks_of(config)
    model_config = shape_of(parts["model"], device)
    amounts = amounts_of(parts, model_config, config["seed"], own, num_ranks, device)
    settings, parallel = parts["trainer"], config["parallel"]
    narrow = parallel.get("param_dtype") == "bfloat16" or (device.cuda and parallel.get("param_dtype") == "auto")
    stage = stage_of(parts, model_config, num_ranks, device, "bfloat16" if narrow else "float32")
    offloaded = bool(parallel.get("cpu_offload"))

    def with_batch(a: Amounts) -> Estimate:
        return Estimate(
            device=device,
            num_ranks=num_ranks,
            num_nodes=num_nodes,
            amounts=a,
            rehearsal=rehearsed(stage, a),
            offloaded=offloaded,
            steps=steps_of(settings, a),
            step_flops=flops_of(model_config, a),
            mfu=own["mfu"],
            price_per_hour=own["price_per_hour"],
            kept_checkpoints=settings.keep_checkpoints,
            batch_size=settings.batch_size,
            compute_bytes=2 if narrow else 4,
        )

    found = with_batch(amounts)
    while found.fits is False and settings.rows_per_microbatch == "auto" and (less := halved(found.amounts, parts)):
        found = with_batch(less)  # as the warm-up does
    return found


def ranks_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the number of nodes, and of ranks on all of them."""
    launcher = config["launcher"] or {}
    nodes = int(launcher.get("nodes") or 1)
    return nodes, nodes * int(launcher.get("processes_per_node") or 1)


def shape_of(model: Any, device: Device) -> Any:
    """Return a model's config, from its option where that has the shape: nothing is fetched.

    On a GPU the attention is what it would be there.
    """
    known = replace(model, init="random") if model.architecture is not None else model
    config = replace(known, attention="auto" if device.cuda else model.attention).load_config(torch.device("cpu"))
    if device.cuda:
        flex = getattr(causal_class(config), "_supports_flex_attn", False)
        ours = "flex" if flex else "sdpa" if config._attn_implementation != "eager" else "eager"
        config._attn_implementation = ATTENTIONS[ours if model.attention in ("auto", "blocks") else model.attention]
    return config


def amounts_of(
    parts: Mapping[str, Any], config: Any, seed: int, own: Mapping[str, Any], num_ranks: int, device: Device
) -> Amounts:
    """Return the amounts of the data if it is here, else assumed ones."""
    reason = "estimate.read_data=false"
    if own["read_data"] is not False:
        try:
            return read_amounts(parts, config, seed, num_ranks, device)
        except Exception as error:
            if own["read_data"] is True:
                raise
            reason = one_line(str(error))[:120]
    assumed = assumed_amounts(parts, own, num_ranks, device)
    return replace(assumed, known_from=f"{assumed.known_from} ({reason})")


def stage_of(parts: Mapping[str, Any], config: Any, num_ranks: int, device: Device, param_dtype: str) -> Stage:
    """Return the stage on which a step is rehearsed. Offloading is no part of it: it moves memory and takes none."""
    given_to = getattr(parts["parallel"], "keywords", {})
    division = {key: given_to.get(key, 1) for key in ("replicate", "tensor")}
    trained = getattr(parts["optim"], "keywords", {}).get("master_dtype", "float32")
    known = {"param_dtype": param_dtype, "cpu_offload": False}
    known = {key: value for key, value in known.items() if key in given_to}
    parts = {**parts, "parallel": partial(parts["parallel"], **known)}

    def build(given: Any, world: Any) -> Scorer:
        scorer = sharded(
            parts, given, divide(world, **division), False, (dtype_named(trained), dtype_named(param_dtype))
        )
        if device.cuda:
            scorer.scored_only = ()  # lengths are fixed there
        return scorer

    return Stage(config, build, parts["optim"], num_ranks, device.cuda)


def rehearsed(stage: Stage, amounts: Amounts) -> Rehearsal:
    """Return the rehearsal of a step. Raises: ValueError if an architecture cannot be rehearsed."""
    try:
        return rehearse(stage, amounts.batch, amounts.num_microbatches)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"models of type {stage.config.model_type} cannot be estimated: the sizes of their tensors depend on "
            f"numbers ({error.func}), and an estimate computes none. Use sftlab.benchmark on a device"
        ) from None


def steps_of(settings: Any, amounts: Amounts) -> int | None:
    """Return the number of steps of a run."""
    if settings.max_steps:
        return int(settings.max_steps)
    if amounts.num_examples is None:
        return None
    return int(settings.epochs * -(-amounts.num_examples // settings.batch_size))


def flops_of(config: Any, amounts: Amounts) -> float | None:
    """Return the operations of a step over all ranks, as a run counts them for its MFU."""
    if amounts.tokens is None:
        return None
    scorer: Any = SimpleNamespace(model=skeleton(config))
    step: Any = SimpleNamespace(num_nodes=amounts.tokens, num_predictions=amounts.predictions, pairs=amounts.pairs)
    return FlopCount(scorer).of(step)


def halved(amounts: Amounts, parts: Mapping[str, Any]) -> Amounts | None:
    """Return the amounts with microbatches of half the rows, as the warm-up halves them; None if one row is left."""
    rows, length = amounts.batch.tokens.shape
    least = parts["data"].row_length or 4096
    batch = amounts.batch
    if rows > 1:
        half = batch.map(lambda v: v[: rows // 2] if v.dim() == 2 else v[batch.at < rows // 2 * length])
    elif length > least:
        keep = max(least, length // 2)
        half = batch.map(lambda v: v[:, :keep].clamp(max=keep) if v.dim() == 2 else v[batch.at < keep])
    else:
        return None
    return replace(amounts, batch=half, num_microbatches=2 * amounts.num_microbatches)
