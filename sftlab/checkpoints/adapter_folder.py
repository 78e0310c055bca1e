"""A trained adapter as a folder in peft's format, and the record of the base that it belongs to.

adapter_config.json and adapter_model.safetensors are peft's, for anybody's tools. base.json is ours: it tells the
base's weights from any others, because an adapter fits every model of the same shape and is wrong on all but one.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sftlab.common.files import open_plain, read_json, refuse_links
from sftlab.models.adapters import ADAPTER_CONFIG, Adapter, inject, peft_name, quiet_peft

ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE = "base.json"
SAMPLES, SAMPLE_BYTES = 64, 4096  # of each of the base's files: reading all of 70B would take minutes
# What decides how peft computes. A key that is not here, and is not as peft sets it by default, is refused.
USED = (
    "r",
    "lora_alpha",
    "target_modules",
    "modules_to_save",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
)
# What says nothing about the computation: how the adapter began, was trained, or is found.
UNUSED = (
    "base_model_name_or_path", "revision", "peft_type", "peft_version", "task_type", "inference_mode", "auto_mapping",
    "lora_dropout", "init_lora_weights", "corda_config", "eva_config", "loftq_config", "lora_ga_config",
    "megatron_core", "qalora_group_size", "runtime_config", "fan_in_fan_out",
)  # fmt: skip


@dataclass(frozen=True)
class Base:
    """The base of an adapter: where it is, a digest of its weights (None if unknown), and how they are quantised."""

    name: str
    revision: str | None = None
    weights: str | None = None
    quantize: str = "none"


def digest_of(files: Iterable[str]) -> str | None:
    """Return a digest of weights from the names, sizes and samples of their files; None without files."""
    made = blake2b(digest_size=16)
    paths = sorted({Path(file) for file in files}, key=lambda path: path.name)
    for path in paths:
        size = path.stat().st_size
        made.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for i in range(SAMPLES):
                file.seek(i * size // SAMPLES)
                made.update(file.read(SAMPLE_BYTES))
    return made.hexdigest() if paths else None


def write_config(model: Any, base: Base, folder: Path) -> None:
    """Write the peft config of a model's adapter, in one order, and the record of its base."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = model.peft_config["default"].to_dict() | {"inference_mode": True}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    for name, node in ((ADAPTER_CONFIG, plain), (BASE, asdict(base))):
        (folder / name).write_text(json.dumps(node, indent=2, sort_keys=True, default=str) + "\n")


def write_weights(trained: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write a model's trained parameters, given by its own names, as peft names them."""
    weights = {peft_name(name): value.contiguous() for name, value in trained.items()}
    save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (folder / ADAPTER_WEIGHTS).chmod(0o644)  # safetensors writes files that only their owner may read


def read_settings(folder: Path) -> dict[str, Any]:
    """Return what an adapter's config says. Raises: ValueError for one that is no LoRA, or has settings unknown here.

    peft would import the module that `megatron_core` names, and some keys change the computation: only what is known
    gets through.
    """
    from peft import LoraConfig

    settings = read_json(refuse_links(folder, ADAPTER_CONFIG))
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ValueError(
            f"{folder / ADAPTER_CONFIG}: peft_type={kind}, and only LORA (with DoRA and rsLoRA) is known here"
        )
    usual: dict[str, Any] = LoraConfig().to_dict()  # type: ignore[no-untyped-call]
    for key, value in settings.items():
        if key not in (*USED, *UNUSED) and value != usual.get(key) and value not in (None, False, {}, []):
            raise ValueError(
                f"{folder / ADAPTER_CONFIG}: {key}={value} is not known here. Merge the adapter with peft first"
            )
    return settings


def read_base(folder: Path) -> Base:
    """Return the base that an adapter's folder names: by our record, else by peft's config alone."""
    settings = read_settings(folder)
    record = read_json(refuse_links(folder, BASE)) if (folder / BASE).is_file() else {}
    return Base(
        str(settings.get("base_model_name_or_path")),
        settings.get("revision"),
        record.get("weights"),
        str(record.get("quantize", "none")),
    )


def attach(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Put a folder's adapter into its base, in place. Raises: ValueError if it is of another base."""
    from peft import LoraConfig

    settings = read_settings(folder)
    inject(LoraConfig(task_type="CAUSAL_LM", **{key: settings[key] for key in USED if key in settings}), model)
    with open_plain(folder / ADAPTER_WEIGHTS, "rb"):
        weights = load_file(folder / ADAPTER_WEIGHTS)
    wanted = {peft_name(name): (name, p) for name, p in model.named_parameters() if p.requires_grad}
    wrong = [f"{name} is missing" for name in wanted.keys() - weights.keys()]
    wrong += [f"{name} belongs to no layer of it" for name in weights.keys() - wanted.keys()]
    for name in wanted.keys() & weights.keys():
        if (shape := tuple(weights[name].shape)) != (fits := tuple(wanted[name][1].shape)):
            wrong.append(f"{name} is {shape} and should be {fits}")
    if wrong:
        raise ValueError(
            f"{folder} holds an adapter of another base: {len(wrong)} of its tensors do not fit this "
            f"{type(model).__name__}, such as: {min(wrong)}"
        )
    state = {wanted[name][0]: nn.Parameter(value.to(dtype), False) for name, value in weights.items()}
    model.load_state_dict(state, strict=False, assign=True)


def merge(model: Any, folder: Path) -> Any:
    """Return a base with a folder's adapter added into its weights, a plain model of transformers.

    A head that is tied to the embedding gets weights of its own where the adapter changes either.
    """
    from peft import PeftModel

    read_settings(folder)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    ends = tuple(f"base_model.model.{names[id(module)]}." for module in (head, table))
    if head.weight is table.weight and any(name.startswith(ends) for name in load_file(folder / ADAPTER_WEIGHTS)):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}
    with quiet_peft():
        return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()


def record(adapter: Adapter, name: str, revision: str | None, files: Iterable[str]) -> Base:
    """Return the record of the base that an adapter is trained on, whose weights lie in `files`."""
    return Base(name, revision, digest_of(files), adapter.quantize)
