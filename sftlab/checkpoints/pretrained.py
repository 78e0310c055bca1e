"""Weights in: from safetensors files, or from a model on rank 0, into the shards of a scorer.

Where the files hold the model's tensors under its own names, every rank reads the parts that it keeps, so no process
ever holds the whole model. Otherwise transformers loads it on rank 0, which then sends the parts. Weights kept in 4
bits are quantised as they are read. An adapter's own values come from the seed.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedModel

from sftlab.common.progress import counted
from sftlab.models import nf4
from sftlab.models.adapters import base_name, first_values, magnitudes
from sftlab.models.load import Model, other_head
from sftlab.models.scorer import Scorer
from sftlab.models.vocabulary import NewRows, tensors_of_tokens
from sftlab.parallel.world import World, local_part, own_slices

TIED_ROWS = 8192  # that are compared at once
WRAPPER = "_checkpoint_wrapped_module."  # activation checkpointing adds it to names


class Wanted(NamedTuple):
    """A tensor of the scorer, and the tensor of the base model that fills it.

    `name` and `shape` are the base's. `quantised` tensors keep it in 4 bits. Both tensors are split by rows alike.
    """

    value: Tensor
    name: str
    shape: torch.Size
    quantised: bool


def fill(scorer: Scorer, model: Model, config: Any, seed: int, world: World) -> GenerationConfig | None:
    """Fill a sharded scorer that has no memory yet: the base from what a model option names, an adapter from `seed`.

    Returns the model's own generation config on rank 0, None elsewhere: the scorer's is made from the config alone.
    Collective.
    """
    new = model.new_rows()
    if new is not None:
        new.check({name: len(value) for name, value in of_tokens(scorer)}, type(scorer.model).__name__)
    files = agreed_files(scorer, model, config, new, world)
    if files:
        allocate(scorer, world.device)
        read_shards(scorer, files, new)
        generation = model.generation_config(config) if world.is_main else None
    else:
        generation = broadcast_weights(scorer, lambda: model.load_weights(config, seed, world.device), world)
    begin_adapter(scorer, seed)
    return generation


def agreed_files(scorer: Scorer, model: Model, config: Any, new: NewRows | None, world: World) -> dict[str, str]:
    """Return the file of each tensor, if every rank finds the files and they hold the model's tensors; else nothing."""
    found: dict[str, str] | Exception = {}
    if world.is_main:
        try:
            found = model.weight_files(config)
            if not holds(found, scorer, new):
                found = {}
            elif other := untied(found, scorer.model.all_tied_weights_keys):
                raise other_head(f"model.name_or_path={model.name_or_path}", *other)
        except Exception as error:
            found = error
    found = world.broadcast(found)
    if isinstance(found, Exception):
        raise found
    missing = not all(Path(file).is_file() for file in set(found.values()))  # another node may have no copy
    return {} if world.any(missing) else found


def holds(files: Mapping[str, str], scorer: Scorer, new: NewRows | None = None) -> bool:
    """Return whether files hold exactly the tensors of a model, in their shapes but for new rows.

    A tied tensor may be there or not.
    """
    found = dict(shapes(files))
    wanted = {part.name: part.shape for part in saved(scorer, files)}
    if new is not None:
        wanted |= {name: torch.Size((new.held, *wanted[name][1:])) for name in by_token(scorer) & wanted.keys()}
    names = (base_name(name) for name, _ in scorer.model.named_parameters(remove_duplicate=False))
    tied = {name.replace(WRAPPER, "") for name in names if name}
    if not wanted.keys() <= files.keys() or not files.keys() <= wanted.keys() | tied:
        return False
    return all(found[name] == list(shape) for name, shape in wanted.items())


def untied(files: Mapping[str, str], ties: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the names of two tensors that the model ties and that files hold with other values; None if all agree."""
    for name, source in ties.items():
        if not {name, source} <= files.keys():
            continue
        with safe_open(files[name], "pt") as one, safe_open(files[source], "pt") as other:
            ours, theirs = one.get_slice(name), other.get_slice(source)
            parts = [slice(i, i + TIED_ROWS) for i in range(0, ours.get_shape()[0], TIED_ROWS)]
            if not all(torch.equal(ours[part], theirs[part]) for part in parts):
                return name, source
    return None


def shapes(files: Mapping[str, str]) -> Iterator[tuple[str, list[int]]]:
    """Yield the name and shape of every tensor."""
    for file in set(files.values()):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  it is no mapping
                yield name, opened.get_slice(name).get_shape()


def saved(scorer: Scorer, files: Mapping[str, Any]) -> Iterator[Wanted]:
    """Yield what the base model saves: parameters, once where they are tied, and persistent buffers.

    A copy that an adapter trains has the values of the base's own. That of a tied weight may lie under the name of the
    other, if `files` have only that.
    """
    modules = dict(scorer.model.named_modules())
    unsaved = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in modules.items()
        for name in module._non_persistent_buffers_set
    }
    ties = scorer.model.all_tied_weights_keys
    for name, value in (*scorer.model.named_parameters(), *scorer.model.named_buffers()):
        ours = base_name(name)
        if name in unsaved or ours is None:
            continue
        ours, shape = ours.replace(WRAPPER, ""), value.shape
        layer = modules[name.rpartition(".")[0]]
        quantised = isinstance(layer, nf4.NF4Linear) and value is layer.codes
        if quantised:
            ours, shape = ours.removesuffix("codes") + "weight", torch.Size((layer.out_features, layer.in_features))
        if ours not in files:
            ours = ties.get(ours, ours)
        yield Wanted(value, ours, shape, quantised)


def of_tokens(scorer: Scorer) -> Iterator[tuple[str, Tensor]]:
    """Yield the base's tensors that have a row for each token, by the base's names; an adapter's have none."""
    for name, value in tensors_of_tokens(scorer.model).items():
        if (ours := base_name(name)) is not None:
            yield ours.replace(WRAPPER, ""), value


def by_token(scorer: Scorer) -> set[str]:
    """Return the names of the tensors that have a row for each token."""
    return {name for name, _ in of_tokens(scorer)}


@torch.no_grad()
def read_shards(scorer: Scorer, files: Mapping[str, str], new: NewRows | None = None) -> None:
    """Read every tensor's part that this rank holds. A file is closed after each, or its pages would count as ours."""
    with_new = by_token(scorer) if new is not None else set()
    parts = list(saved(scorer, files))
    for value, name, shape, quantised in counted("weights", parts, len(parts)):
        part = own_slices(value)
        mine = local_part(value)
        if not mine.numel():
            continue  # fewer rows than ranks
        if quantised:
            part = (part[0], slice(0, shape[1]))
        with safe_open(files[name], framework="pt") as opened:
            if new is not None and name in with_new:
                new.copy(mine, part, opened.get_slice(name))
            else:
                read = opened.get_slice(name)[part] if part else opened.get_tensor(name)
                mine.copy_(nf4.encode(read.to(mine.device, torch.float32)) if quantised else read)


@torch.no_grad()
def begin_adapter(scorer: Scorer, seed: int) -> None:
    """Give an adapter its first values, the same on any number of ranks. With them a model is its base. Collective."""
    for name, value in scorer.model.named_parameters():
        if base_name(name) is None:
            whole = first_values(name.replace(WRAPPER, ""), value.shape, seed)
            local_part(value).copy_(whole[own_slices(value)])
    for magnitude, layer, dim in magnitudes(scorer.model):
        weight = layer.codes if isinstance(layer, nf4.NF4Linear) else layer.weight
        assert isinstance(weight, Tensor)
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        if isinstance(layer, nf4.NF4Linear):
            whole = nf4.decode(whole, torch.float32)
        lengths = torch.linalg.norm(whole.float(), dim=dim)
        if zero := int((lengths == 0).sum()):
            name = next(n for n, module in scorer.model.named_modules() if module is layer).removesuffix(".base_layer")
            raise ValueError(
                f"peft=dora on {name}: {zero} of its rows are zero, often that of the padding token, and DoRA divides "
                "by their length. Leave the layer out of peft.targets, or use peft=lora"
            )
        local_part(magnitude).copy_(lengths[own_slices(magnitude)])


def allocate(scorer: Scorer, device: torch.device) -> None:
    """Give every parameter its memory on `device`, or on the host if FSDP keeps it there; buffers keep their values.

    What was shared is shared again.
    """
    home = torch.device("cpu") if scorer.on_host else device
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in scorer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module, name))
    scorer._apply(  # type: ignore[no-untyped-call]
        lambda t: torch.empty_like(t, device=home) if t.is_meta else t.to(device)
    )
    for (first, its_name), *others in owners.values():
        for module, name in others:
            module.register_parameter(name, getattr(first, its_name))


def broadcast_weights(scorer: Scorer, load: Callable[[], PreTrainedModel], world: World) -> GenerationConfig | None:
    """Fill a sharded scorer that has no memory yet with the weights of a model that rank 0 loads. Collective.

    Returns that model's own generation config on rank 0, None elsewhere. Buffers that no file holds are copied too: the
    model may have changed them while it was loaded.
    """
    allocate(scorer, world.device)
    whole = load() if world.is_main else None
    state: dict[str, Any] = {} if whole is None else state_of(whole, scorer)
    set_model_state_dict(
        scorer.model,
        state,
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False),
    )
    theirs = dict(whole.named_buffers()) if whole is not None else {}
    for name, buffer in scorer.model.named_buffers():
        buffer = local_part(buffer)
        if whole is not None:
            buffer.copy_(theirs[str(base_name(name))])
        dist.broadcast(buffer, src=0)
    return whole.generation_config if whole is not None else None


@torch.no_grad()
def state_of(whole: PreTrainedModel, scorer: Scorer) -> dict[str, Tensor]:
    """Return a loaded model's tensors by the scorer's names, in the scorer's dtypes. Raises: KeyError if one lacks."""
    theirs = whole.state_dict()
    names = {id(value): name for name, value in (*scorer.model.named_parameters(), *scorer.model.named_buffers())}
    state = {}
    for value, name, _, quantised in saved(scorer, theirs):
        read = theirs[name]
        state[names[id(value)].replace(WRAPPER, "")] = nf4.encode(read.float()) if quantised else read.to(value.dtype)
    return state
