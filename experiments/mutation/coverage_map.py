"""Which tests run which line, and how long each takes: measured once per tree, a test file at a time, and kept.

The map is a file of JSON lines, one per test file, under the user's cache and named by a hash of the tree, so that an
interrupted measurement goes on where it was and a changed tree is measured anew.
"""

import hashlib
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Sequence
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
        for line in lines:
            self._add(line)

    def _add(self, line: dict[str, Any]) -> None:
        file = line["file"]
        users: dict[str, set[str]] = defaultdict(set)
        if not line.get("tests") and line.get("code") not in (0, 5):
            self.left_out[file] = f"{line['outcome']}, exit code {line.get('code')}"
        for test, found in line.get("tests", {}).items():
            if found["outcome"] != "passed":
                if found["outcome"] != "skipped":
                    self.left_out[test] = found["outcome"]
                continue
            self.seconds[test] = found["seconds"]
            self.needs[test] = [(file, fixture) for fixture in found["fixtures"]]
            for context in (found["context"], *found["fixtures"]):
                users[context].add(test)
        for fixture, found in line.get("fixtures", {}).items():
            self.fixture_seconds[file, fixture] = found["seconds"]
        for source, lines in line["lines"].items():
            for number, contexts in lines.items():
                for context in contexts:
                    self.covering[source, int(number)] |= users[context]

    def expected(self, tests: Sequence[str]) -> float:
        """Return how many seconds these tests should take together."""
        fixtures = {fixture for test in tests for fixture in self.needs[test]}
        files = {test.partition("::")[0] for test in tests}
        own = sum(self.seconds[test] for test in tests)
        return own + sum(self.fixture_seconds.get(f, 0.0) for f in fixtures) + IMPORT_S * len(files)

    def tests(self, mutant: Mutant) -> set[str]:
        """Return the tests that run a mutant's line; for a line that is run on import, those of its whole file."""
        found = set() if mutant.fixed else self.covering.get((mutant.file, mutant.line), set())
        found = found or (set() if mutant.fixed else self.covering.get((mutant.file, mutant.statement), set()))
        if mutant.fixed:
            found = set().union(*(tests for (file, _), tests in self.covering.items() if file == mutant.file))
        return found - self.left_out.keys()

    def choose(self, mutant: Mutant, limit: float) -> list[str]:
        """Return its tests in the order to run them: at least one of every file, then the cheapest within `limit` s."""
        cheapest = sorted(self.tests(mutant), key=lambda test: (self.seconds[test], test))
        firsts = list({test.partition("::")[0]: test for test in reversed(cheapest)}.values())
        chosen, spent = set(firsts), sum(self.seconds[test] for test in firsts)
        for test in cheapest:
            if test not in chosen and spent + self.seconds[test] <= limit:
                chosen.add(test)
                spent += self.seconds[test]
        by_file: dict[str, list[str]] = defaultdict(list)
        for test in cheapest:
            if test in chosen:
                by_file[test.partition("::")[0]].append(test)
        return [test for tests in sorted(by_file.values(), key=self.expected) for test in tests]
