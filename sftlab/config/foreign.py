"""Words of other trainers: what a key of TRL, transformers, axolotl, AutoModel or torchtune is called here.

The table is foreign.yaml. Whoever types such a key, or converts a file of such keys, is told what to set, with the
value that was given; what needs more than that value is computed here (`compute` names the function).
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftlab.common.files import read_yaml
from sftlab.common.values import as_typed

Given = Mapping[str, Any]  # the foreign keys that were typed, with their values
PER_DEVICE = ("per_device_train_batch_size", "micro_batch_size", "step_scheduler.local_batch_size", "batch_size")
ACCUMULATION = "gradient_accumulation_steps"
GLOBAL = ("step_scheduler.global_batch_size", "global_batch_size", "train_batch_size")
LENGTHS = ("max_steps", "step_scheduler.max_steps", "trainer.max_steps")
RATES = ("learning_rate", "lr", "optimizer.lr", "optim.lr")
ADAMW = re.compile(r"adamw?(_torch|_torch_fused|_hf|_apex_fused|_anyprecision)?")


@dataclass(frozen=True)
class Answer:
    """What a foreign key is here: the overrides to type (none where there is nothing to set), and a sentence."""

    settings: tuple[str, ...]
    note: str = ""


@functools.cache
def table() -> tuple[Mapping[str, Any], ...]:
    """Return the rows of foreign.yaml."""
    return tuple(read_yaml(Path(__file__).with_name("foreign.yaml")))


def row_of(key: str) -> Mapping[str, Any] | None:
    """Return the row of a key."""
    return rows().get(key)


@functools.cache
def rows() -> Mapping[str, Mapping[str, Any]]:
    """Return the row of every foreign key."""
    return {name: row for row in table() for name in row["keys"]}


def name_of(key: str, groups: Set[str]) -> str:
    """Return the foreign key that a dotted key of the command line means: itself, or its last part behind a group."""
    path, _, leaf = key.rpartition(".")
    return leaf if key not in rows() and leaf in rows() and path in groups else key


def answer(key: str, value: Any, given: Given) -> Answer | None:
    """Return what to set for a foreign key, None if it is nobody's; `given` are all that were typed with it."""
    row = row_of(key)
    if row is None:
        return None
    note = row.get("note", "")
    if "compute" in row:
        found: Answer = COMPUTE[row["compute"]](key, value, given)
        return Answer(found.settings, "; ".join(filter(None, (found.note, note))))
    here = row["here"]
    if isinstance(here, Mapping):
        here = here.get(as_typed(value).lower(), here.get("*"))
    return Answer(tuple(word.replace("{value}", as_typed(value)) for word in (here or "").split()), note)


def lines(given: Given) -> list[str]:
    """Return a line for every foreign key in what was typed, those that have one answer together."""
    told: dict[Answer, list[str]] = {}
    for key, value in given.items():
        if found := answer(key, value, given):
            told.setdefault(found, []).append(f"{key}={as_typed(value)}")
    out = []
    for found, typed in told.items():
        what = " ".join(found.settings) or "nothing to set"
        out.append(f"{' '.join(typed)}: {what}" + (f"; {found.note}" if found.note else ""))
    return out


def batch(key: str, value: Any, given: Given) -> Answer:
    """Examples per step: rows of a device times accumulation times devices, or what is said for all devices."""
    whole = first(given, GLOBAL)
    if isinstance(whole, int):
        return Answer((f"trainer.batch_size={whole}",))
    rows, steps = first(given, PER_DEVICE), given.get(ACCUMULATION)
    if not all(isinstance(number, int) for number in (rows, steps) if number is not None):
        return Answer((), "trainer.batch_size is a whole number")
    product = (rows or 1) * (steps or 1)
    lacking = "" if rows is not None else "times the rows of a device, and "
    return Answer((f"trainer.batch_size={product}",), f"on one device; {lacking}times their number on several")


def epochs(key: str, value: Any, given: Given) -> Answer:
    """Whole epochs; a part of one is a number of steps."""
    if isinstance(value, float) and not value.is_integer():
        return Answer((), "trainer.epochs counts whole epochs; set trainer.max_steps for a part of one")
    return Answer((f"trainer.epochs={int(value) if isinstance(value, float) else as_typed(value)}",))


def max_steps(key: str, value: Any, given: Given) -> Answer:
    """Steps of the run; -1 elsewhere means that epochs decide."""
    return Answer(("trainer.max_steps=null" if value == -1 else f"trainer.max_steps={as_typed(value)}",))


def warmup_ratio(key: str, value: Any, given: Given) -> Answer:
    """Steps: the ratio of max_steps, where that is given."""
    steps = first(given, LENGTHS)
    if isinstance(steps, int) and steps > 0 and isinstance(value, int | float):
        return Answer((f"schedule.warmup_steps={round(value * steps)}",))
    return Answer((), f"schedule.warmup_steps={as_typed(value)} x the number of steps")


def min_lr(key: str, value: Any, given: Given) -> Answer:
    """A fraction of the learning rate."""
    rate = first(given, RATES)
    if isinstance(rate, int | float) and rate and isinstance(value, int | float):
        return Answer((f"schedule.final_ratio={value / rate:g}",))
    return Answer((), f"schedule.final_ratio={as_typed(value)} / optim.lr")


def optimizer(key: str, value: Any, given: Given) -> Answer:
    """AdamW in 32 bits; others are said to be other ones."""
    name = str(value).rpartition(".")[2].lower()
    if ADAMW.fullmatch(name):
        return Answer(("optim=adamw",), "Adam without weight decay is optim.weight_decay=0" if name == "adam" else "")
    return Answer(("optim=adamw",), f"{value} is another optimiser, with other results")


def betas(key: str, value: Any, given: Given) -> Answer:
    """Both betas in one list."""
    first_beta, second = given.get("adam_beta1", 0.9), given.get("adam_beta2", 0.999)
    return Answer((f"optim.betas=[{as_typed(first_beta)},{as_typed(second)}]",))


def chat_template(key: str, value: Any, given: Given) -> Answer:
    """A file, or a template's name, which a base model's tokenizer may lack."""
    if str(value).endswith((".jinja", ".jinja2")):
        return Answer((f"data.format.template_path={value}",))
    if str(value).startswith("tokenizer_default"):
        return Answer(())
    return Answer((), f"data.format.template_path=FILE, where the tokenizer has no template like {as_typed(value)}")


def val_set_size(key: str, value: Any, given: Given) -> Answer:
    """Examples that are held out; a share of them must be counted first."""
    if isinstance(value, int):
        return Answer((f"data.val_examples={value}",))
    return Answer((), f"data.val_examples={as_typed(value)} x the number of examples, which sftlab preview prints")


def targets(key: str, value: Any, given: Given) -> Answer:
    """Names of linear layers; '*_proj' is every one of a decoder block."""
    if value in ("all-linear", "*_proj", ["*_proj"]):
        return Answer(("peft=lora", "peft.targets=all-linear"))
    names = value if isinstance(value, list) else [value]
    return Answer(("peft=lora", f"peft.targets=[{','.join(map(str, names))}]"))


COMPUTE: Mapping[str, Callable[[str, Any, Given], Answer]] = {
    f.__name__: f
    for f in (batch, epochs, max_steps, warmup_ratio, min_lr, optimizer, betas, chat_template, val_set_size, targets)
}


def first(given: Given, keys: Iterable[str]) -> Any:
    """Return the first of these keys that was given a value."""
    return next((given[key] for key in keys if given.get(key) is not None), None)


def as_markdown() -> str:
    """Return the table as docs/migrating.md shows it."""
    lines = ["| there | in | here | |", "| --- | --- | --- | --- |"]
    for row in table():
        names = ", ".join(f"`{key}`" for key in row["keys"])
        lines.append(f"| {names} | {', '.join(row['of'].split())} | {cell(row)} | {row.get('note', '')} |")
    return "\n".join(lines)


def cell(row: Mapping[str, Any]) -> str:
    """Return what to set here, for the table."""
    if "compute" in row:
        return str(COMPUTE[row["compute"]].__doc__).rstrip(".")
    here = row["here"]
    if not isinstance(here, Mapping):
        return f"`{here}`" if here else "nothing"
    return "; ".join(f"`{value}`: " + (f"`{text}`" if text else "nothing") for value, text in here.items())


if __name__ == "__main__":
    print(as_markdown())
