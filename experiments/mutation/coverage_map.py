"""Which tests run which line, and how long each takes: measured once per tree, a test file at a time, and kept.

The map is a file of JSON lines, one per test file, under the user's cache and named by a hash of the tree, so that an
interrupted measurement goes on where it was and a changed tree is measured anew.
"""

import hashlib
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.mutation.operators import Mutant
from experiments.mutation.worker import Worker

MEASURED = ("sftlab", "hydra_plugins", "conf", "tests", "pyproject.toml")
FILE_LIMIT_S = 1800.0
IMPORT_S = 3.0  # of a test file and of what it imports, in a forked child


def tree_hash(root: Path, parts: Sequence[str] = MEASURED) -> str:
    """Return a hash of everything that decides what tests run and what they find."""
    digest = hashlib.sha256()
    for part in parts:
        for path in sorted((root / part).rglob("*")) if (root / part).is_dir() else [root / part]:
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def default_file(root: Path) -> Path:
    """Return where the map of this tree is kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "sftlab" / "mutation" / f"{tree_hash(root)}.jsonl"


def measure(worker: Worker, test_file: str, packages: Sequence[str]) -> dict[str, Any]:
    """Return a test file's line of the map: its tests, its fixtures, and the lines of `packages` that each ran."""
    folder = Path(tempfile.mkdtemp(prefix="mutation-map-"))
    sources = "\n    ".join(str(worker.tree / package) for package in packages)
    quiet = (
        "no-data-collected, module-not-imported, trace-changed, already-imported, couldnt-parse, module-not-measured"
    )
    (folder / "coveragerc").write_text(
        f"[run]\nsource =\n    {sources}\ndata_file = {folder}/data\nparallel = true\n"
        f"context = ${{MUTATION_CONTEXT-}}\n"
        f"patch = _exit\ndisable_warnings = {quiet}\n"
    )
    try:
        reply = worker.run([test_file], FILE_LIMIT_S, coverage=folder)
        return {"file": test_file, **reply, "lines": _lines(folder, worker.tree)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _lines(folder: Path, tree: Path) -> dict[str, dict[str, list[str]]]:
    """Return {file: {line: contexts}} of all that the processes of a test file wrote."""
    import coverage

    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for path in sorted(folder.glob("data.*")):
        data = coverage.CoverageData(str(path))
        try:
            data.read()
            for file in data.measured_files():
                for line, contexts in data.contexts_by_lineno(file).items():
                    found[str(Path(file).relative_to(tree))][str(line)] |= {c.rpartition("|")[2] for c in contexts}
        except coverage.CoverageException:
            continue  # of a process that was killed as it wrote
    return {file: {line: sorted(c) for line, c in lines.items()} for file, lines in found.items()}


class Map:
    """The tests of each line, with their durations."""

    def __init__(self, lines: Sequence[dict[str, Any]]) -> None:
        self.seconds: dict[str, float] = {}
        self.needs: dict[str, list[tuple[str, str]]] = {}  # test: its fixtures of wider scope
        self.fixture_seconds: dict[tuple[str, str], float] = {}
        self.left_out: dict[str, str] = {}  # test: why
        self.covering: dict[tuple[str, int], set[str]] = defaultdict(set)
        self.sharing: dict[tuple[str, int], set[str]] = defaultdict(set)  # by no more than a fixture of a conftest.py
        for line in lines:
            self._add(line)

    def _add(self, line: dict[str, Any]) -> None:
        file, fixtures = line["file"], line.get("fixtures", {})
        users: dict[str, set[str]] = defaultdict(set)
        if not line.get("tests") and line.get("code") not in (0, 5):
            self.left_out[file] = f"{line['outcome']}, exit code {line.get('code')}"
        for test, found in line.get("tests", {}).items():
            if found["outcome"] == "passed":
                self.seconds[test] = found["seconds"]
                self.needs[test] = [(file, fixture) for fixture in found["fixtures"]]
                for context in (found["context"], *found["fixtures"]):
                    users[context].add(test)
            elif found["outcome"] != "skipped":
                self.left_out[test] = found["outcome"]
        self.fixture_seconds |= {(file, name): fixture["seconds"] for name, fixture in fixtures.items()}
        for source, numbers in line["lines"].items():
            for number, contexts in numbers.items():
                for context in contexts:
                    found = self.sharing if fixtures.get(context, {}).get("shared") else self.covering
                    found[source, int(number)] |= users[context]

    def expected(self, tests: Iterable[str]) -> float:
        """Return how many seconds these tests should take together."""
        cost, paid = 0.0, set[object]()
        for test in tests:
            cost += self._price(test, paid)
        return cost

    def _price(self, test: str, paid: set[object]) -> float:
        """Return what a test adds: its own time, and that of its file and fixtures which nobody has paid yet."""
        new = {test.partition("::")[0], *self.needs[test]} - paid
        paid |= new
        return self.seconds[test] + sum(
            IMPORT_S if isinstance(n, str) else self.fixture_seconds.get(n, 0.0) for n in new
        )

    def tests(self, mutant: Mutant) -> tuple[set[str], set[str]]:
        """Return the tests that run a mutant's line, and those that only share a fixture which does.

        For a line that runs on import these are the tests of its whole file.
        """
        places = [(mutant.file, mutant.line), (mutant.file, mutant.statement)]
        run = [p for p in places if p in self.covering or p in self.sharing]
        own, shared = self._of(run[:1])
        if mutant.fixed or (run and not own and not shared):
            own, shared = self._of([p for p in {*self.covering, *self.sharing} if p[0] == mutant.file])
        return own, shared

    def _of(self, places: Sequence[tuple[str, int]]) -> tuple[set[str], set[str]]:
        own = {test for place in places for test in self.covering.get(place, ())} - self.left_out.keys()
        shared = {test for place in places for test in self.sharing.get(place, ())} - self.left_out.keys()
        return own, shared - own

    def choose(self, mutant: Mutant, limit: float) -> list[str]:
        """Return its tests in the order to run them, quick files first, of about `limit` s in all.

        The cheapest tests are taken first, because most take milliseconds. Then comes the cheapest of every file that
        is still missing, for which twice the limit may be spent, and two per file of those that only share a fixture.
        """
        own, shared = (sorted(tests, key=lambda t: (self.seconds[t], t)) for tests in self.tests(mutant))
        by_file: dict[str, list[str]] = defaultdict(list)
        for test in shared:
            by_file[test.partition("::")[0]].append(test)
        firsts = list({test.partition("::")[0]: test for test in reversed(own)}.values())
        firsts.sort(key=lambda t: self.expected([t]))
        few = [test for tests in by_file.values() for test in tests[:2]]
        chosen, paid, spent = set[str](), set[object](), 0.0
        for tests, most in ((own, limit), (firsts, 2 * limit), (few, limit)):
            for test in tests:
                price = self._price(test, set(paid))
                if test not in chosen and (spent + price <= most or not chosen):
                    chosen.add(test)
                    spent += self._price(test, paid)
        groups: dict[str, list[str]] = defaultdict(list)
        for test in sorted(chosen, key=lambda t: (self.seconds[t], t)):
            groups[test.partition("::")[0]].append(test)
        return [test for tests in sorted(groups.values(), key=self.expected) for test in tests]
