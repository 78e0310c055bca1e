"""Resolve what `run=` names (a run directory, checkpoint, model folder or hub id) to a model that can be loaded.

Every command after training starts here. Nothing here builds components.
"""

import functools
import hashlib
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sftlab.assets import SCHEME, locate
from sftlab.common import revisions, run_directory
from sftlab.common.files import refuse_links
from sftlab.common.run_directory import CONFIG
from sftlab.config.trust import refuse_code
from sftlab.inference.adapter import adapted, base_of
from sftlab.inference.own_code import refuse_own_code
from sftlab.models.adapters import ADAPTER_CONFIG
from sftlab.models.load import Model

log = logging.getLogger(__name__)
HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")


@dataclass(frozen=True)
class TrainedModel:
    """A trained model: where its folder is, and the run that made it, if known.

    `model` is a folder or hub id for `from_pretrained`, `config` the run's resolved config. `trust` is the user's word
    that code which comes with it may run. `option` is set for a run's base: the run's model option, which may have
    added tokens.
    """

    given: str
    model: str
    run_dir: Path | None = None
    config: Mapping[str, Any] | None = None
    revision: str | None = None
    trust: bool = False
    option: Model | None = None

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
        known = {f.name for f in fields(Model)}
        option = Model(**{k: v for k, v in model.items() if k in known} | {"trust_remote_code": self.trust})
        return TrainedModel(self.given, option.name_or_path, None, self.config, option.revision, self.trust, option)

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

    @functools.cached_property
    def under(self) -> "TrainedModel | None":
        """The base under an adapter; None for a whole model. Raises: ValueError for an adapter of another base."""
        return base_of(self)

    def load_config(self) -> Any:
        """Return the model's transformers config."""
        from transformers import AutoConfig

        if self.under is not None:
            return self.under.load_config()
        return load(AutoConfig.from_pretrained, self.model, "model", **self._hub())

    def load_generation_config(self) -> Any:
        """Return the model's generation config, or one made from its config if it has none."""
        from transformers import GenerationConfig

        try:
            return GenerationConfig.from_pretrained(locate(self.model), revision=self.revision)
        except OSError:
            return GenerationConfig.from_model_config(self.load_config())

    def load_model(self, device: Any = "cpu", dtype: Any = "auto") -> Any:
        """Return the whole model on one device, for inference."""
        from transformers import AutoModelForCausalLM

        from sftlab.models.architecture import cached_attention

        if self.under is not None:
            return adapted(self, self.under, device, dtype)
        chosen = cached_attention(self.load_config())
        return (
            load(
                AutoModelForCausalLM.from_pretrained,
                self.model,
                "model",
                dtype=dtype,
                attn_implementation=chosen,
                **self._hub(),
            )
            .to(device)
            .eval()
        )

    def _hub(self) -> dict[str, Any]:
        """Return the arguments for the hub. A model's own code runs only by the user's word, never by its config's."""
        refuse_own_code(Path(locate(self.model)), f"run={self.given}", self.trust)
        if self.trust and not Path(locate(self.model)).is_dir():
            log.warning("trust=true: code that %s brings will run on this machine", self.model)
        return {"trust_remote_code": self.trust, "revision": self.revision}


def load(from_pretrained: Any, name: str, kind: str, key: str = "run", **settings: Any) -> Any:
    """Return what `from_pretrained` loads. Raises: errors of the hub in words that say what to do."""
    from sftlab.common.hub import explain

    try:
        return from_pretrained(locate(name), **settings)
    except Exception as error:
        if Path(locate(name)).is_dir():
            raise ValueError(f"{key}={name}: this folder does not load as a {kind}: {error}") from error
        taught = explain(error, name, kind, key)
        raise type(taught)(f"there is no folder {name} here, and {taught}") from error


def resolve(run: str | None, trust: bool = False) -> TrainedModel:
    """Return what `run` names; `trust` is the user's word that code which comes with it may run.

    Raises: Untrusted if its config names code of its own without that word; FileNotFoundError if there is no such
    folder; ValueError for a folder that is no run, checkpoint or model,
    or for a run without a finished model (names its newest checkpoint).
    """
    from sftlab.checkpoints.manifest import is_checkpoint

    if not run:
        raise ValueError("run= is missing: give a run directory, a checkpoint, a model folder or a hub id")
    path = Path(locate(run)).expanduser()
    if not path.exists():
        if HUB_ID.match(run) and not run.startswith("."):
            return TrainedModel(run, run, trust=trust)
        raise FileNotFoundError(f"run={run}: no such folder{nearby(path)}")
    if not path.is_dir():
        raise ValueError(f"run={run} is a file: expected the folder of a run, a checkpoint or a model")
    if (path / CONFIG).is_file():
        return of_run(run, path, trust)
    if is_model(path):
        return of_model(run, path, trust)
    if is_checkpoint(path):
        return of_checkpoint(run, path.resolve(), trust)
    raise ValueError(f"run={run} is no run: it has neither {CONFIG} nor a model's config.json{nearby(path)}")


def is_model(folder: Path) -> bool:
    """Return whether a folder holds a model, or an adapter."""
    return (folder / "config.json").is_file() or (folder / ADAPTER_CONFIG).is_file()


def config_near(run: str) -> Mapping[str, Any]:
    """Return the config of the run that `run` names, or that its model or checkpoint lies in; empty for neither.

    Reads this one file: nothing is loaded, exported or checked.
    """
    path = Path(locate(run)).expanduser()
    run_dir = path if (path / CONFIG).is_file() else run_around(path)
    return {} if run_dir is None else run_directory.read_config(run_dir)


def of_run(run: str, path: Path, trust: bool) -> TrainedModel:
    """Return the finished model of a run directory."""
    from sftlab.checkpoints.manifest import complete_checkpoints

    if is_model(path / "model"):
        return TrainedModel(run, str(path / "model"), path, read_config(path, trust), trust=trust)
    checkpoints = complete_checkpoints(path / "checkpoints")
    offer = (
        f"Its newest checkpoint can be used: run={checkpoints[-1]}"
        if checkpoints
        else "It has no checkpoint either: resume its training, or see its train.log"
    )
    raise ValueError(f"run={run} is not finished: it has no model/ yet. {offer}")


def of_model(run: str, path: Path, trust: bool) -> TrainedModel:
    """Return the model of a folder, with the run that the folder lies in, if any."""
    run_dir = run_around(path)
    model = str(path) if not run.startswith(SCHEME) else run
    return TrainedModel(run, model, run_dir, read_config(run_dir, trust), trust=trust)


def run_around(path: Path) -> Path | None:
    """Return the run directory that a model's folder or a checkpoint lies in, if any."""
    return next((p for p in path.resolve().parents[:2] if (p / CONFIG).is_file()), None)


def of_checkpoint(run: str, path: Path, trust: bool) -> TrainedModel:
    """Return a checkpoint's model; write it to the run's export/ first if it is not there yet.

    Raises: ValueError if several ranks would write it.
    """
    run_dir, step = path.parent.parent, step_of(path)
    config = read_config(run_dir, trust)
    model = refuse_links(run_dir, "export", path.name)
    if not is_model(model):
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"run={run} is a checkpoint, and its model is written by one process: first run "
                f"python -m sftlab.export run={run_dir} step={step}"
            )
        export_checkpoint(path, model, trust=trust)
    return TrainedModel(run, str(model), run_dir, config, trust=trust)


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint by its folder's name."""
    number = checkpoint.name.rpartition("_")[2]
    if not number.isdecimal():
        raise ValueError(f"{checkpoint} is no checkpoint of a run: expected a folder named step_00000100")
    return int(number)


def export_checkpoint(
    checkpoint: Path,
    folder: Path,
    dtype: str = "run",
    shard_size: str = "5GB",
    trust: bool = False,
    merge: bool = False,
) -> str:
    """Write a checkpoint as a model folder; return its dtype's name, by default as the run's config sets it.

    An adapter is written as one, in float32, or with `merge` added into its base as a whole model.
    Raises: ValueError for `merge` without an adapter.
    """
    from sftlab.checkpoints.hugging_face import SIDECAR, export
    from sftlab.inference.adapter import export_merged
    from sftlab.parallel.fsdp2 import compute_dtype
    from sftlab.parallel.world import device_of

    run_dir = checkpoint.parent.parent
    config = read_config(run_dir, trust)
    assert config is not None
    refuse_own_code(checkpoint / SIDECAR, str(checkpoint), trust)
    here = device_of(0)
    chosen = compute_dtype(config["parallel"].get("param_dtype", "auto") if dtype == "run" else dtype, here)
    folder.parent.mkdir(parents=True, exist_ok=True)
    adapter = (checkpoint / SIDECAR / ADAPTER_CONFIG).is_file()
    if merge and not adapter:
        raise ValueError(f"merge=true: {checkpoint} holds a whole model, no adapter. Export it without merge")
    if not merge:
        export(checkpoint, folder, chosen, trust_remote_code=trust, shard_size=shard_size)
        return "float32" if adapter else str(chosen).removeprefix("torch.")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".adapter.") as beside:
        export(checkpoint, Path(beside) / "model", chosen)
        trained = TrainedModel(str(run_dir), str(Path(beside) / "model"), run_dir, config, trust=trust)
        export_merged(trained, folder, chosen, shard_size)
    return str(chosen).removeprefix("torch.")


def read_config(run_dir: Path | None, trust: bool) -> Mapping[str, Any] | None:
    """Return a run's resolved config, None without a run. Raises: Untrusted if it names code of its own.

    Its `trust_remote_code` counts for nothing: `refuse_own_code` looks at the model that is loaded.
    """
    if run_dir is None:
        return None
    config = run_directory.read_config(run_dir)
    refuse_code(
        {"data": config.get("data")}, f"{run_dir / CONFIG}", trust
    )  # nothing else in it is built after training
    return revisions.with_commits(config, revisions.read(run_dir))


def nearby(path: Path) -> str:
    """Return which runs lie under the nearest folder that exists, for a message."""
    folder = next(p for p in (path, *path.absolute().parents) if p.is_dir())
    found = sorted(p.parent for depth in ("*", "*/*") for p in folder.glob(f"{depth}/{CONFIG}"))
    return f". Runs near it: {', '.join(str(p) for p in found[-3:])}" if found else ""
