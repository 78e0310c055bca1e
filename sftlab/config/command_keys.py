"""What the keys of a command take, beside those of train: one class per command, its fields the keys of its YAML.

The values of a command are checked like those of a component, before the command does anything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf

from sftlab.common.values import Bounds, Count, NotNegative, Positive, Whole
from sftlab.config.binding import bind, resolved

Port = Annotated[int, Bounds(least=0, most=65535)]
TopP = Annotated[float, Bounds(above=0, most=1)]


@dataclass(kw_only=True)
class Evaluate:
    """The keys of evaluate."""

    run: str | None
    trust: bool
    limit: Count | None
    baseline: bool
    answers: bool
    tasks: Sequence[str]
    tasks_path: str | None
    num_fewshot: Whole | None
    output_dir: str | None
    max_new_tokens: Count | None
    batch_size: Count


@dataclass(kw_only=True)
class Generate:
    """The keys of generate."""

    run: str | None
    trust: bool
    prompt: str | None
    fields: Mapping[str, Any]
    prompts: str | None
    output: str | None
    chat: bool
    system: str | None
    max_new_tokens: Count
    temperature: NotNegative
    top_k: Whole
    top_p: TopP
    seed: int
    batch_size: Count


@dataclass(kw_only=True)
class Serve:
    """The keys of serve."""

    run: str | None
    trust: bool
    engine: Literal["auto", "vllm", "transformers"]
    host: str
    port: Port
    allowed_hosts: Sequence[str]
    allowed_origins: Sequence[str]
    name: str | None
    prompt: str
    vllm_python: str | None
    vllm_arguments: Sequence[Any]


@dataclass(kw_only=True)
class Publish:
    """The keys of publish."""

    run: str | None
    trust: bool
    repo_id: str | None
    private: bool
    dry_run: bool
    update: bool
    license: str | None
    prompt: str | None
    message: str | None


@dataclass(kw_only=True)
class Export:
    """The keys of export."""

    run: str
    trust: bool
    step: Whole | None
    dtype: Literal["run", "auto", "float32", "bfloat16"]
    output: str | None
    shard_size: str | int


@dataclass(kw_only=True)
class Sweep:
    """The keys of sweep."""

    dir: str
    trust: bool
    metric: str
    score: Literal["last", "best"]
    cancel: bool
    watch: bool
    report: bool


@dataclass(kw_only=True)
class Preview:
    """The keys of preview."""

    rows: Whole
    row: Count | None
    step: Count
    output: str | None
    picture: str | None


@dataclass(kw_only=True)
class Benchmark:
    """The keys of benchmark."""

    case: Literal["squad", "chat", "dense", "agent"] | None
    layouts: Sequence[Literal["tree", "packed", "padded"]]
    scale: Positive
    warm_up: Count
    windows: Count
    steps_per_window: Count
    output: str
    profile: str | None
    compare: str | None
    tolerance: Annotated[float, Bounds(above=0, most=1)]


@dataclass(kw_only=True)
class Convert:
    """The keys of convert."""

    file: str
    output: str | None
    overwrite: bool


@dataclass(kw_only=True)
class Doctor:
    """The keys of doctor."""

    folder: str
    only: Sequence[str]
    json: bool


@dataclass(kw_only=True)
class Cache:
    """The keys of cache."""

    remove: str | int | None
    confirmed: bool


@dataclass(kw_only=True)
class Schema:
    """The keys of schema."""

    output: str | None


KINDS = (Evaluate, Generate, Serve, Publish, Export, Sweep, Preview, Benchmark, Convert, Doctor, Cache, Schema)
COMMANDS = {kind.__name__.lower(): kind for kind in KINDS}


def check_command(name: str, config: Any) -> None:
    """Raise ValueError for a value that a command's own key does not take."""
    kind = COMMANDS.get(name)
    if kind is not None:
        keys = [key for key in kind.__dataclass_fields__ if key in config]
        bind("", resolved(OmegaConf.masked_copy(config, keys)), kind)
