"""A trained adapter on its base, for inference and for an export as one whole model.

The base is the one that the run's config names. An adapter's own files may have been changed by anybody, and an adapter
fits every model of its base's shape: so what they name, and the base's weights, must be what the run trained on.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftlab.assets import SCHEME, locate
from sftlab.models.adapters import ADAPTER_CONFIG

if TYPE_CHECKING:
    from sftlab.inference.trained_model import TrainedModel

log = logging.getLogger(__name__)
ENDS = ("lm_head", "embed_tokens", "embed_out", "embed_in", "wte")  # heads and embeddings
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def rank_in_vllm(folder: Path) -> int | None:
    """Return the --max-lora-rank with which vLLM serves a folder's adapter; None if it does not serve it as it is.

    It serves LoRA beside the linear layers of the blocks, on a base that is not quantised.
    """
    from sftlab.checkpoints.adapter_folder import read_base, read_settings

    settings = read_settings(folder)
    ends = any(str(name).endswith(ENDS) for name in settings["target_modules"])
    if ends or settings["use_dora"] or settings["modules_to_save"] or read_base(folder).quantize != "none":
        return None
    rank = int(settings["r"])
    return next((known for known in VLLM_RANKS if known >= rank), rank)


def base_of(trained: "TrainedModel") -> "TrainedModel | None":
    """Return the base under the adapter that `trained` names; None if it names a whole model.

    Raises: ValueError if the adapter's own config names another base than its run, or the base was random.
    """
    from sftlab.checkpoints.adapter_folder import read_base

    folder = Path(locate(trained.model))
    if (folder / "config.json").is_file() or not (folder / ADAPTER_CONFIG).is_file():
        return None
    named = read_base(folder)
    if trained.config is None:
        log.warning("run=%s is an adapter of %s, by its own %s", trained.given, named.name, ADAPTER_CONFIG)
        return replace(trained, model=named.name, revision=named.revision)
    model: Mapping[str, Any] = trained.config["model"]
    if model["init"] == "random":
        raise ValueError(
            f"run={trained.given} is an adapter of random weights, which no file holds: it cannot be used. Train it "
            "on a pretrained model, or train every weight (peft=none)"
        )
    name = str(model["name_or_path"])
    if not same_place(named.name, name):
        raise ValueError(
            f"run={trained.given}: an adapter of another base. Its {ADAPTER_CONFIG} names {named.name}, its run "
            f"trained {name}. Export a checkpoint of the run again: python -m sftlab.export run={trained.run_dir}"
        )
    found = name if not Path(named.name).is_dir() or Path(locate(name)).is_dir() else named.name
    return replace(trained, model=found, revision=model["revision"])


def same_place(recorded: str, name: str) -> bool:
    """Return whether an adapter's record of its base means the same as a run's config.

    The record of a local folder is absolute; the config's may be relative to where the run began.
    """
    if recorded in (name, os.path.abspath(locate(name))):
        return True
    tail = Path(name.removeprefix(SCHEME)).parts
    return not Path(name).is_absolute() and ".." not in tail and Path(recorded).parts[-len(tail) :] == tail


def adapted(trained: "TrainedModel", base: "TrainedModel", device: Any, dtype: Any) -> Any:
    """Return the base with the adapter in it, on one device, for inference."""
    from transformers import GenerationConfig

    from sftlab.checkpoints.adapter_folder import attach

    folder = Path(locate(trained.model))
    model = load_base(trained, base, dtype)
    attach(model, folder, model.dtype)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.to(device).eval()


def load_base(trained: "TrainedModel", base: "TrainedModel", dtype: Any) -> Any:
    """Return the base as the adapter was trained on it, on the host. Raises: ValueError if it has other weights."""
    import torch

    from sftlab.checkpoints.adapter_folder import digest_of, read_base
    from sftlab.models.load import Model
    from sftlab.models.nf4 import rounded
    from sftlab.models.vocabulary import grow

    record = read_base(Path(locate(trained.model)))
    option = Model(base.model, revision=base.revision, trust_remote_code=base.trust)
    if record.weights and digest_of(option.weight_files(base.load_config()).values()) != record.weights:
        raise ValueError(
            f"run={trained.given}: an adapter of another base. The weights in {base.model} are not those that it was "
            "trained on: bring them back, or train again"
        )
    model = base.load_model("cpu", dtype if record.quantize == "none" else torch.float32)
    added = trained.base.option if trained.config is not None else None
    if added is not None and (new := added.new_rows()):
        grow(model, new)
    if record.quantize == "none":
        return model
    rounded(model)
    return model if dtype == "auto" else model.to(dtype)


def export_merged(trained: "TrainedModel", folder: Path, dtype: Any, shard_size: str) -> None:
    """Write the base with the adapter added into its weights as a whole model; the sums are made in float32."""
    import torch
    from transformers import GenerationConfig

    from sftlab.checkpoints.adapter_folder import merge
    from sftlab.checkpoints.hugging_face import written_whole

    base = base_of(trained)
    assert base is not None
    adapter = Path(locate(trained.model))
    model = merge(load_base(trained, base, torch.float32), adapter).to(dtype)
    with written_whole(folder) as partial:
        if (adapter / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(adapter)
        model.save_pretrained(partial, max_shard_size=shard_size)
        trained.load_tokenizer().save_pretrained(partial)
