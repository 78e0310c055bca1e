"""Resolve what `run=` names (a run directory, checkpoint, model folder or hub id) to a model that can be loaded.

Every command after training starts here. Nothing here builds components.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftlab.assets import SCHEME, locate
from sftlab.common import run_directory
from sftlab.common.run_directory import CONFIG

HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")


@dataclass(frozen=True)
class TrainedModel:
    """A trained model: where its folder is, and the run that made it, if known.

    `model` is a folder or hub id for `from_pretrained`, `config` the run's resolved config.
    """

    given: str
    model: str
    run_dir: Path | None = None
    config: Mapping[str, Any] | None = None
    revision: str | None = None

    @property
    def folder(self) -> Path:
        """Where commands write results on this model: the run's directory, else a folder named after the model."""
        if self.run_dir is None:
            return Path("evaluations") / re.sub(r"[^\w.-]+", "--", self.given.strip("/."))
        return self.run_dir

    @property
    def base(self) -> "TrainedModel":
        """The model that the run started from. Raises: ValueError if that is unknown, or was random."""
        if self.config is None:
            raise ValueError(f"run={self.given} names a model without the run that made it: its base is not known")
        model = self.config["model"]
        if model["init"] == "random":
            raise ValueError(f"run={self.given} started from random weights: it has no base model to compare with")
        return TrainedModel(self.given, model["name_or_path"], None, self.config, model["revision"])

    @property
    def fingerprint(self) -> str:
        """A text that changes with the weights: sizes and times of a folder's files, name and revision on the hub."""
        folder = Path(locate(self.model))
        files = sorted(p for pattern in ("*.safetensors", "*.bin", "*.json") for p in folder.glob(pattern))
        stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        return f"{self.model} {self.revision} {hashlib.blake2b(repr(stats).encode(), digest_size=8).hexdigest()}"

    @property
    def format(self) -> Mapping[str, Any] | None:
        """The config node of the run's text format; None if it is unknown or the data has several."""
        format: Mapping[str, Any] | None = (self.config or {}).get("data", {}).get("format")
        return format

    def load_tokenizer(self) -> Any:
        """Return the tokenizer."""
        from transformers import AutoTokenizer

        return load(AutoTokenizer.from_pretrained, self.model, "tokenizer", **self._hub())

    def load_config(self) -> Any:
        """Return the model's transformers config."""
        from transformers import AutoConfig

        return load(AutoConfig.from_pretrained, self.model, "model", **self._hub())

    def load_model(self, device: Any = "cpu", dtype: Any = "auto") -> Any:
        """Return the whole model on one device, for inference."""
        from transformers import AutoModelForCausalLM

        return (
            load(AutoModelForCausalLM.from_pretrained, self.model, "model", dtype=dtype, **self._hub())
            .to(device)
            .eval()
        )

    def _hub(self) -> dict[str, Any]:
        """Return the arguments for the hub. Code from the hub runs only if the run's own config allowed it."""
        trusted = bool((self.config or {}).get("model", {}).get("trust_remote_code"))
        return {"trust_remote_code": trusted, "revision": self.revision}


def load(from_pretrained: Any, name: str, kind: str, key: str = "run", **settings: Any) -> Any:
    """Return what `from_pretrained` loads. Raises: errors of the hub in words that say what to do."""
    from sftlab.common.hub import explain

    try:
        return from_pretrained(locate(name), **settings)
    except Exception as error:
        if Path(locate(name)).is_dir():
            raise ValueError(f"{key}={name}: this folder does not load as a {kind}: {error}") from error
        taught = explain(error, name, kind, key)
        raise type(taught)(f"{taught}. There is no folder {name} here") from error


def resolve(run: str | None) -> TrainedModel:
    """Return what `run` names.

    Raises: FileNotFoundError if there is no such folder; ValueError for a folder that is no run, checkpoint or model,
    or for a run without a finished model (names its newest checkpoint).
    """
    from sftlab.checkpoints.manifest import is_checkpoint

    if not run:
        raise ValueError("run= is missing: give a run directory, a checkpoint, a model folder or a hub id")
    path = Path(locate(run)).expanduser()
    if not path.exists():
        if HUB_ID.match(run) and not run.startswith("."):
            return TrainedModel(run, run)
        raise FileNotFoundError(f"run={run}: no such folder{nearby(path)}")
    if not path.is_dir():
        raise ValueError(f"run={run} is a file: expected the folder of a run, a checkpoint or a model")
    if (path / CONFIG).is_file():
        return of_run(run, path)
    if (path / "config.json").is_file():
        return of_model(run, path)
    if is_checkpoint(path):
        return of_checkpoint(run, path.resolve())
    raise ValueError(f"run={run} is no run: it has neither {CONFIG} nor a model's config.json{nearby(path)}")


def of_run(run: str, path: Path) -> TrainedModel:
    """Return the finished model of a run directory."""
    from sftlab.checkpoints.manifest import complete_checkpoints

    if (path / "model" / "config.json").is_file():
        return TrainedModel(run, str(path / "model"), path, read_config(path))
    checkpoints = complete_checkpoints(path / "checkpoints")
    offer = (
        f"Its newest checkpoint can be used: run={checkpoints[-1]}"
        if checkpoints
        else "It has no checkpoint either: resume its training, or see its train.log"
    )
    raise ValueError(f"run={run} is not finished: it has no model/ yet. {offer}")


def of_model(run: str, path: Path) -> TrainedModel:
    """Return the model of a folder, with the run that the folder lies in, if any."""
    run_dir = next((p for p in path.resolve().parents[:2] if (p / CONFIG).is_file()), None)
    return TrainedModel(run, str(path) if not run.startswith(SCHEME) else run, run_dir, read_config(run_dir))


def of_checkpoint(run: str, path: Path) -> TrainedModel:
    """Return a checkpoint's model; write it to the run's export/ first if it is not there yet.

    Raises: ValueError if several ranks would write it.
    """
    run_dir, step = path.parent.parent, int(path.name.rpartition("_")[2])
    model = run_dir / "export" / path.name
    if not (model / "config.json").is_file():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"run={run} is a checkpoint, and its model is written by one process: first run "
                f"python -m sftlab.export run={run_dir} step={step}"
            )
        export_checkpoint(path, model)
    return TrainedModel(run, str(model), run_dir, read_config(run_dir))


def export_checkpoint(checkpoint: Path, folder: Path, dtype: str = "run", shard_size: str = "5GB") -> str:
    """Write a checkpoint as a model folder; return its dtype's name, by default as the run's config sets it."""
    from sftlab.checkpoints.hugging_face import export
    from sftlab.parallel.fsdp2 import compute_dtype
    from sftlab.parallel.world import device_of

    config = read_config(checkpoint.parent.parent)
    assert config is not None
    here = device_of(0)
    chosen = compute_dtype(config["parallel"].get("param_dtype", "auto") if dtype == "run" else dtype, here)
    folder.parent.mkdir(parents=True, exist_ok=True)
    trusted = bool(config["model"].get("trust_remote_code"))
    export(checkpoint, folder, chosen, trust_remote_code=trusted, shard_size=shard_size)
    return str(chosen).removeprefix("torch.")


def read_config(run_dir: Path | None) -> Mapping[str, Any] | None:
    """Return a run's resolved config, None without a run."""
    return None if run_dir is None else run_directory.read_config(run_dir)


def nearby(path: Path) -> str:
    """Return which runs lie under the nearest folder that exists, for a message."""
    folder = next(p for p in (path, *path.absolute().parents) if p.is_dir())
    found = sorted(p.parent for depth in ("*", "*/*") for p in folder.glob(f"{depth}/{CONFIG}"))
    return f". Runs near it: {', '.join(str(p) for p in found[-3:])}" if found else ""
