"""Put small bugs into the core rooms, one at a time, and count those that the tests which cover them notice.

    python experiments/mutation/run.py                      # an hour on two cores; the map of the tests first
    python experiments/mutation/run.py --list --sample 20   # only print what would be put in
    python experiments/mutation/run.py --only sftlab/schedule.py:21
    python experiments/mutation/run.py --survivors          # try again what survived, after new tests
    python experiments/mutation/run.py --table              # the tables of what is in the results

Results are appended as they come, so that a repeated command goes on where it stopped.
"""

import argparse
import json
import queue
import random
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO))

from experiments.mutation.coverage_map import Map, default_file, measure, tree_hash  # noqa: E402
from experiments.mutation.operators import Mutant, mutants, read_defaults  # noqa: E402
from experiments.mutation.worker import PRELOAD, Worker  # noqa: E402

HERE = Path(__file__).parent
PACKAGE = "sftlab"
# A folder of the package is a room, and so is a module at its top. Names that the tree does not have are ignored.
CORE_ROOMS = (
    *("training", "checkpoints", "parallel", "data", "models", "inference", "scoring", "sweeps", "launchers", "config"),
    *("common", "serving", "publishing", "launcher", "report"),
    *("trainer", "run", "optim", "schedule", "throughput", "preempt", "metrics", "rundir", "checkpoint", "distributed"),
    *("rng", "evaluation", "generation", "decoding", "sweep", "search", "points", "trials", "comparison", "measure"),
    *("jobs", "build", "command", "settings", "secret", "manifest", "trained", "prompts", "completion", "export"),
)
TESTS_LIMIT_S = 120.0  # the tests of one mutant, by the map's durations
WANTED = 0.9


def room(file: str) -> str:
    """Return the room of a source file: the folder under the package, or the module's own name at its top."""
    parts = Path(file).parts[1:]
    return parts[0] if len(parts) > 1 else Path(parts[0]).stem


def find(root: Path, rooms: Iterable[str] | None = None, package: str = PACKAGE) -> list[Mutant]:
    """Return every mutant of these rooms (None: of all)."""
    sources = {str(p.relative_to(root)): p.read_text() for p in sorted((root / package).rglob("*.py"))}
    defaults = read_defaults(sources)
    wanted = None if rooms is None else set(rooms)
    files = [f for f in sources if wanted is None or room(f) in wanted]
    return [mutant for file in files for mutant in mutants(file, sources[file], defaults)]


def draw(found: Sequence[Mutant], num: int, seed: int) -> list[Mutant]:
    """Return a sample in random order: rooms by their number of mutants, operators in turn, each line once."""
    rng = random.Random(seed)
    waiting: dict[str, dict[str, list[Mutant]]] = defaultdict(lambda: defaultdict(list))
    for mutant in rng.sample(found, len(found)):
        waiting[room(mutant.file)][mutant.operator].append(mutant)
    sizes = {name: sum(map(len, operators.values())) for name, operators in waiting.items()}
    taken: dict[str, list[Mutant]] = {name: [] for name in waiting}
    lines: set[tuple[str, int]] = set()
    while sizes and sum(map(len, taken.values())) < num:
        name = min(
            sizes, key=lambda n: (len(taken[n]) > 0, (len(taken[n]) + 1) / sizes[n])
        )  # furthest behind its share
        counts = Counter(m.operator for m in taken[name])
        operator = min(waiting[name], key=lambda o: (counts[o], o))
        mutant = waiting[name][operator].pop()
        if (mutant.file, mutant.line) not in lines:
            taken[name].append(mutant)
            lines.add((mutant.file, mutant.line))
        if not waiting[name][operator]:
            del waiting[name][operator]
        if not waiting[name]:
            del waiting[name], sizes[name]
    drawn = [mutant for mutants in taken.values() for mutant in mutants]
    return rng.sample(drawn, len(drawn))


class Trial:
    """Tries mutants on a worker; knows which tests were seen to pass on the unmutated tree in this same way."""

    def __init__(self, root: Path, covering: Map, limit: float = TESTS_LIMIT_S) -> None:
        self.root, self.map, self.limit = root, covering, limit
        self.sound: set[str] = set()

    def test(self, worker: Worker, mutant: Mutant) -> dict[str, Any]:
        """Return what came of a mutant. A test that fails without it as well is left out, and the rest is run again."""
        begun = time.monotonic()
        text = mutant.apply((self.root / mutant.file).read_text())
        while tests := self.map.choose(mutant, self.limit):
            reply = worker.run_with(mutant.file, text, tests, 3 * self.map.expected(tests) + 60)
            self.sound |= set(reply["passed"])
            killer = next(iter(reply["failed"]), "")
            if not killer or killer in self.sound or "::" not in killer or self.holds(worker, killer):
                break
            self.map.left_out[killer] = "fails without a bug"
        outcome = {"passed": "survived", "failed": "killed"}.get(reply["outcome"], "timed out") if tests else "survived"
        return {
            **{k: getattr(mutant, k) for k in ("file", "line", "operator", "before", "after")},
            **{"room": room(mutant.file), "outcome": outcome, "tests": len(tests)},
            **({"killer": killer, "error": reply["failed"][killer]} if tests and killer else {}),
            **({} if tests else {"not covered": True}),
            "seconds": round(time.monotonic() - begun, 1),
        }

    def holds(self, worker: Worker, test: str) -> bool:
        """Say whether a test passes alone and without a bug."""
        if worker.run([test], 3 * self.map.expected([test]) + 60)["passed"] != [test]:
            return False
        self.sound.add(test)
        return True


def in_parallel(workers: Sequence[Worker], items: Iterable[Any], work: Any, until: float = float("inf")) -> None:
    """Do `work(worker, item)` for each item, in turn on whichever worker is free, and begin none after `until`."""
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    errors: list[BaseException] = []
    for item in items:
        waiting.put(item)

    def go(worker: Worker) -> None:
        try:
            while not errors and time.monotonic() < until:
                work(worker, waiting.get_nowait())
        except queue.Empty:
            pass
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=go, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def read_results(path: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Return the last result of each mutant."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {(r["file"], r["before"], r["after"]): r for r in map(json.loads, lines)}


def read_reasons(path: Path) -> dict[tuple[str, str, str], str]:
    """Return why each known survivor is none of the tests' business."""
    known = tomllib.loads(path.read_text()).get("survivor", []) if path.exists() else []
    return {(s["file"], s["before"], s["after"]): s["reason"] for s in known}


def make_map(path: Path, workers: Sequence[Worker], test_files: Sequence[str]) -> None:
    """Measure the test files that the map has not yet, the largest first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    have = {json.loads(line)["file"] for line in path.read_text().splitlines()} if path.exists() else set()
    missing = sorted(set(test_files) - have, key=lambda f: -(REPO / f).stat().st_size)
    lock = threading.Lock()

    def work(worker: Worker, file: str) -> None:
        line = measure(worker, file, [PACKAGE])
        with lock:
            with path.open("a") as out:
                out.write(json.dumps(line) + "\n")
            print(f"map: {file}, {len(line.get('tests', {}))} tests, {line['seconds']:.0f} s", flush=True)

    in_parallel(workers, missing, work)


def tables(results: Sequence[dict[str, Any]], reasons: dict[tuple[str, str, str], str]) -> str:
    """Return the tables in Markdown: by room, by operator, the survivors with their reasons."""
    text = ""
    for title in ("room", "operator"):
        text += (
            f"| {title} | put in | killed | timed out | survived | killed, % |\n| --- | --- | --- | --- | --- | --- |\n"
        )
        names = sorted({r[title] for r in results})
        for name in [*names, "all"]:
            counts = Counter(r["outcome"] for r in results if name in (r[title], "all"))
            caught = counts["killed"] + counts["timed out"]
            share = f"{100 * caught / max(1, counts.total()):.0f}"
            cells = (name, counts.total(), counts["killed"], counts["timed out"], counts["survived"], share)
            text += f"| {' | '.join(map(str, cells))} |\n"
        text += "\n"
    survivors = sorted((r for r in results if r["outcome"] == "survived"), key=lambda r: (r["file"], r["line"]))
    text += "| survivor | before | after | reason |\n| --- | --- | --- | --- |\n"
    for r in survivors:
        reason = reasons.get((r["file"], r["before"], r["after"])) or ("no test runs it" if "not covered" in r else "")
        before, after = (f"`{_short(r[k])}`".replace("|", "\\|") for k in ("before", "after"))
        text += f"| {r['file']}:{r['line']} {r['operator']} | {before} | {after} | {reason} |\n"
    return text


def _short(text: str) -> str:
    return "(dropped)" if not text else text if len(text) <= 140 else text[:139] + "…"


def write_readme(path: Path, table: str) -> None:
    """Put the tables between the two marks of the README."""
    begin, end = "<!-- tables: made by run.py -->", "<!-- end of tables -->"
    head, _, rest = path.read_text().partition(begin)
    path.write_text(f"{head}{begin}\n\n{table}\n{end}{rest.partition(end)[2]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rooms", help="comma-separated; default: the core rooms")
    parser.add_argument("--sample", type=int, default=300, help="how many mutants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60, help="begin no mutant after that many; the map is extra")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=float, default=TESTS_LIMIT_S, help="seconds of tests per mutant, about")
    parser.add_argument("--out", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--only", help="FILE:LINE, every mutant of one line")
    parser.add_argument("--list", action="store_true", help="print the sample and stop")
    parser.add_argument("--map", action="store_true", help="measure the map and stop")
    parser.add_argument("--map-file", type=Path, help="default: under the user's cache, named by the tree's hash")
    parser.add_argument("--tests", help="comma-separated test files that are measured and used; default: all")
    parser.add_argument("--survivors", action="store_true", help="only what survived before, again")
    parser.add_argument("--table", action="store_true", help="print the tables of the results and stop")
    parser.add_argument("--readme", action="store_true", help="put the tables into README.md")
    given = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the workers are ended, too
    results = read_results(given.out)
    if not given.table:
        found = find(REPO, given.rooms.split(",") if given.rooms else CORE_ROOMS)
        if given.only:
            sample = [m for m in find(REPO) if f"{m.file}:{m.line}" == given.only]
        elif given.survivors:
            sample = [m for m in find(REPO) if results.get(m.key, {}).get("outcome") == "survived"]
        else:
            sample = draw(found, given.sample, given.seed)
        print(f"{len(sample)} of {len(found)} mutants")
        if given.list:
            for m in sample:
                print(f"{m.file}:{m.line} {m.operator}\n    {m.before}\n    {m.after or '(dropped)'}")
            return 0
        _run(given, [m for m in sample if given.only or given.survivors or m.key not in results])
        if given.map:
            return 0
        results = read_results(given.out)
    print()
    table = tables(list(results.values()), read_reasons(HERE / "survivors.toml"))
    print(table)
    if given.readme:
        write_readme(HERE / "README.md", table)
    caught = sum(r["outcome"] != "survived" for r in results.values())
    return 0 if caught >= WANTED * len(results) else 1


def _run(given: argparse.Namespace, sample: Sequence[Mutant]) -> None:
    """Make what the map lacks, then try the sample."""
    test_files = given.tests.split(",") if given.tests else _test_files(REPO)
    map_file = given.map_file or default_file(REPO)
    workers = [Worker(REPO, PRELOAD) for _ in range(given.workers)]
    try:
        make_map(map_file, workers, test_files)
        lines = [line for line in map(json.loads, map_file.read_text().splitlines()) if line["file"] in test_files]
        covering = Map(lines)
        for test, why in covering.left_out.items():
            print(f"left out: {test}: {why}")
        if given.map:
            return
        trial, lock, begun = Trial(REPO, covering, given.limit), threading.Lock(), time.monotonic()
        tree, outcomes = tree_hash(REPO), Counter[str]()

        def work(worker: Worker, mutant: Mutant) -> None:
            result = {**trial.test(worker, mutant), "tree": tree}
            with lock:
                with given.out.open("a") as out:
                    out.write(json.dumps(result) + "\n")
                outcomes[result["outcome"]] += 1
                num, left = outcomes.total(), given.minutes - (time.monotonic() - begun) / 60
                print(
                    f"{num}/{len(sample)}, {num - outcomes['survived']} killed, {left:.0f} minutes left: "
                    f"{result['outcome']} in {result['seconds']:.0f} s, {mutant.file}:{mutant.line} {mutant.operator}",
                    flush=True,
                )

        in_parallel(workers, sample, work, begun + 60 * given.minutes)
        for test in [t for t, why in covering.left_out.items() if why == "fails without a bug"]:
            print(f"left out: {test}: fails without a bug")
    finally:
        for worker in workers:
            worker.close()


def _test_files(root: Path) -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "tests"], cwd=root, capture_output=True)
    files = [Path(name) for name in listed.stdout.decode().splitlines()]
    return [str(f) for f in files if f.name.startswith("test_") and f.suffix == ".py" and f.stem != "test_mutation"]


if __name__ == "__main__":
    sys.exit(main())
