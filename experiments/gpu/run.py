"""Run the parts one after another, each in a process with a limit; leave one JSON and one table. See run.sh."""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.gpu import parts
from experiments.gpu.bench import Bench
from experiments.gpu.parts import PARTS, Part

BUDGET_S = 525.0  # for all parts, so that everything ends within 9 minutes
LEAST_S = 15.0  # a part with less time left is not started
TAIL = 25  # lines of a failed part's log that are recorded


def arguments(typed: list[str]) -> argparse.Namespace:
    made = argparse.ArgumentParser(prog="experiments/gpu/run.sh", description=__doc__)
    made.add_argument("--tiny", action="store_true", help="the demo's model, on a CPU too")
    made.add_argument("--out", type=Path, default=Path("runs") / "gpu", help="folder for the results (%(default)s)")
    made.add_argument("--parts", default=",".join(PARTS), help="some of %(default)s")
    made.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for all parts (%(default)s)")
    made.add_argument("--tokenizer", help="folder of a tokenizer; default: the demo's")
    made.add_argument("--peers", help="the folder that experiments/peers/build.sh filled")
    given = made.parse_args(typed)
    unknown = sorted(set(given.parts.split(",")) - set(PARTS))
    if unknown:
        made.error(f"--parts {unknown[0]}: expected some of {','.join(PARTS)}")
    given.out = given.out.absolute()
    return given


def bench(given: argparse.Namespace) -> Bench:
    """Return what the parts are told."""
    return Bench(given.out, given.tiny, given.tokenizer, given.peers)


def child(act: Callable[[], None], log: Path, limit_s: float) -> str:
    """Run something in a fork of this process, which has imported everything; return how it ended.

    A fork saves each part the imports, 6 to 12 s. So this process must never touch the device itself.
    """
    process = multiprocessing.get_context("fork").Process(target=alone, args=(act, log))
    process.start()
    process.join(limit_s)
    if process.exitcode is None:
        os.killpg(process.pid or 0, signal.SIGKILL)  # its own children too: they would hold the device
        process.join()
        return f"no end in {limit_s:.0f} s"
    return "done" if process.exitcode == 0 else f"failed with exit code {process.exitcode}"


def alone(act: Callable[[], None], log: Path) -> None:
    """Run something in a session of its own, all output in a file. Exits with 1 on an error."""
    os.setsid()
    with log.open("w", buffering=1, encoding="utf-8") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        sys.stdout = sys.stderr = file
        try:
            act()
        except Exception:
            traceback.print_exc()
            sys.exit(1)


def leave(file: Path, values: dict[str, Any]) -> None:
    """Write what a part found; it must be JSON."""
    file.write_text(json.dumps(values, indent=2), encoding="utf-8")


def run_part(part: Part, given: argparse.Namespace, left_s: float) -> dict[str, Any]:
    """Run a part in a process of its own; return its outcome, seconds and values, or the end of its log."""
    if left_s < LEAST_S:
        return {"outcome": f"not started: {max(0.0, left_s):.0f} s left", "seconds": 0.0, "values": {}, "log": []}
    file, log = given.out / f"{part.name}.json", given.out / "logs" / f"{part.name}.log"
    file.unlink(missing_ok=True)
    began_s = time.monotonic()
    outcome = child(lambda: leave(file, part.run(bench(given))), log, min(part.limit_s, left_s))
    values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if outcome == "done" and (missed := parts.missed(part, values, given.tiny)):
        outcome = f"missed: {'; '.join(missed)}"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    found = {"outcome": outcome, "seconds": time.monotonic() - began_s, "values": values}
    return found if values else found | {"log": lines[-TAIL:]}


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Run every part that was asked for; return the results. Raises: SystemExit without a device, unless tiny."""
    (given.out / "logs").mkdir(parents=True, exist_ok=True)
    began_s = time.monotonic()
    file, log = given.out / "machine.json", given.out / "logs" / "machine.log"
    file.unlink(missing_ok=True)
    prepared = child(lambda: leave(file, parts.prepare(bench(given))), log, given.budget)
    if prepared != "done":
        sys.exit(f"error: the data could not be made, {prepared}:\n{log.read_text(encoding='utf-8')}")
    machine = json.loads(file.read_text(encoding="utf-8"))
    if not machine["cuda"] and not given.tiny:
        sys.exit("error: there is no CUDA device here; --tiny runs every part on a CPU")
    found = {}
    for name in given.parts.split(","):
        print(f"{name}: {PARTS[name].title} ...", flush=True)
        found[name] = run_part(PARTS[name], given, given.budget - (time.monotonic() - began_s))
        print(f"  {found[name]['outcome']}, {found[name]['seconds']:.0f} s; {said(name, found[name])}", flush=True)
    return {**machine, "tiny": given.tiny, "seconds": time.monotonic() - began_s, "parts": found}


def said(name: str, part: dict[str, Any]) -> str:
    """Return a part's values in one line; of a part that left none, the end of its log."""
    return PARTS[name].said(part["values"]) if part["values"] else " ".join(part["log"][-1:])


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    rows = [f"{results['hardware']['device']}, torch {results['versions']['torch']}, commit {results['commit']}", ""]
    rows += ["| part | outcome | seconds | |", "| --- | --- | --- | --- |"]
    for name, part in results["parts"].items():
        rows.append(f"| {name} | {part['outcome']} | {part['seconds']:.0f} | {said(name, part).replace('|', '/')} |")
    bad = [name for name, part in results["parts"].items() if part["outcome"] != "done"]
    rows += ["", f"{len(results['parts']) - len(bad)} of {len(results['parts'])} parts done as they must be"]
    rows += [f"not so: {', '.join(bad)} (logs/NAME.log)"] if bad else []
    return "\n".join(rows)


def main(typed: list[str]) -> int:
    """Return the exit code: 1 if a part failed, was not started, or missed what must stand."""
    given = arguments(typed)
    results = run(given)
    leave(given.out / "results.json", results)
    (given.out / "results.md").write_text(table(results) + "\n", encoding="utf-8")
    print(f"\n{table(results)}\nwritten to {given.out}/results.json and results.md")
    return int(any(part["outcome"] != "done" for part in results["parts"].values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
