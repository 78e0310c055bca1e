"""A benchmark from start to end: check, make data, build each layout's run as train would, measure, compare.

It trains with the trainer of `sftlab.train` itself, in a temporary run directory, and saves and evaluates nothing.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from sftlab.benchmarking import results
from sftlab.benchmarking.cases import CASES, STAND_IN, write_stand_in
from sftlab.benchmarking.hardware import hardware, software
from sftlab.benchmarking.measure import EXTRA_STEPS, measure
from sftlab.benchmarking.words import Words
from sftlab.common.files import write_json
from sftlab.config.binding import check
from sftlab.config.unknown import nearest
from sftlab.data.forest import LAYOUTS
from sftlab.parallel.fsdp2 import compute_dtype
from sftlab.parallel.world import world
from sftlab.training.build import component
from sftlab.training.run import quiet_libraries

FILES = ("output", "profile", "compare")  # settings that change nothing that is measured


def benchmark(config: dict[str, Any], own: Mapping[str, Any], overrides: Sequence[str], began_s: float) -> None:
    """Measure a config's runs, show a table, write JSON. Raises: ValueError for regressions against `compare`."""
    check_settings(own)
    before = results.read_baseline(Path(own["compare"])) if own["compare"] else None
    check(config)
    for file in (own["output"], own["profile"]):
        if file is not None:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
    if config["data"].get("path") == STAND_IN and own["case"] is None:
        raise ValueError(
            f"data.path={STAND_IN} stands for a case's generated data: add case=, one of {', '.join(CASES)}"
        )
    with tempfile.TemporaryDirectory(prefix="sftlab_benchmark_") as folder, world() as here:
        quiet_libraries(here)
        machine = hardware(here)
        if before is not None:
            results.refuse_other(Path(own["compare"]), before, own["case"], machine["device"], own["layouts"])
        found = {
            "schema": results.SCHEMA,
            **software(),
            "hardware": machine,
            "case": own["case"],
            "data": config["data"].get("path", "a mixture"),
            "model": config["model"]["name_or_path"],
            "overrides": [o for o in overrides if o.partition("=")[0] not in FILES],
            "dtype": str(compute_dtype(config["parallel"].get("param_dtype", "auto"), here.device))[6:],
            "imports_s": time.perf_counter() - began_s,
            "convention": results.CONVENTION,
            "layouts": {},
        }
        config = prepared(config, own, Path(folder))
        for layout in own["layouts"]:
            run = config | {"data": config["data"] | {"layout": layout}}
            found["parameters"], found["layouts"][layout] = measure(run, own, here, Path(folder) / layout)
        if here.is_main:
            show(found, own)
        if before is not None:
            compare(found, own, before, here.is_main)


def check_settings(own: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting of the benchmark itself that cannot be."""
    case, layouts = own["case"], own["layouts"]
    if case is not None and case not in CASES:
        raise ValueError(f"case={case}: {nearest(str(case), CASES)}expected one of {', '.join(CASES)}")
    if not isinstance(layouts, list) or not layouts or len(set(layouts)) < len(layouts):
        raise ValueError(f"layouts={layouts}: expected a list of different layouts, such as [tree,padded]")
    for layout in layouts:
        if layout not in LAYOUTS:
            raise ValueError(f"layouts: {layout}: {nearest(str(layout), LAYOUTS)}expected some of {', '.join(LAYOUTS)}")
    for key, least in (("warm_up", 1), ("windows", 1), ("steps_per_window", 1)):
        if type(own[key]) is not int or own[key] < least:
            raise ValueError(f"{key}={own[key]}: expected a whole number of at least {least}")
    for key, most in (("scale", 100.0), ("tolerance", 1.0)):
        if not isinstance(own[key], int | float) or not 0 < own[key] <= most:
            raise ValueError(f"{key}={own[key]}: expected a number above 0, at most {most:g}")


def prepared(config: dict[str, Any], own: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the config of what is measured: as many steps as are needed, no validation, generated data in place."""
    num_steps = own["warm_up"] + own["windows"] * own["steps_per_window"] + EXTRA_STEPS
    unvalidated = {key: 0 if key == "val_examples" else None for key in config["data"] if key.startswith("val_")}
    data = config["data"] | unvalidated
    if data.get("path") == STAND_IN:
        words = Words(component("model", config["model"]).load_tokenizer(), config["seed"])
        num = num_steps * config["trainer"]["batch_size"]
        data["path"] = str(write_stand_in(own["case"], folder, words, num, own["scale"]))
    return config | {"data": data, "trainer": config["trainer"] | {"max_steps": num_steps}, "tracker": {}}


def show(found: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Print the table and write the JSON."""
    output = Path(own["output"])
    write_json(output, found)
    console = Console(highlight=False)
    console.print(results.table(found))
    console.print(results.CONVENTION, markup=False, style="dim")
    console.print(f"written to {output}", markup=False, soft_wrap=True)


def compare(found: Mapping[str, Any], own: Mapping[str, Any], before: Mapping[str, Any], shown: bool) -> None:
    """Print the results beside those of a baseline. Raises: ValueError, on every rank, if there is a regression."""
    changes = results.changes(before, found, own["tolerance"])
    if shown:
        console = Console(highlight=False)
        console.print(f"beside {own['compare']}, of {before['date']}, commit {str(before['commit'])[:9]}", markup=False)
        if before["overrides"] != found["overrides"]:
            console.print(f"  it was measured with {' '.join(before['overrides'])}", markup=False)
        console.print(results.table_of_changes(changes))
    worse = [str(change) for change in changes if change.worse]
    if worse:
        raise ValueError(f"worse than {own['compare']} by more than tolerance={own['tolerance']:g}: {'; '.join(worse)}")
