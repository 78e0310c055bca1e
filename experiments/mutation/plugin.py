"""What pytest is given in a child of a worker: which tests in which order, what came of each, and whose lines they ran.

A test's lines are those of its set-up, its body and the processes that it starts. What a fixture of a wider scope runs
belongs to every test that uses the fixture, not to the first one alone.
"""

import os
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

CONTEXT = "MUTATION_CONTEXT"  # tells a process that a test starts on whose behalf it runs


class Chosen:
    """Runs these tests only, in this order, and keeps what came of them."""

    def __init__(self, tests: Sequence[str]) -> None:
        self.place = {test: i for i, test in enumerate(tests)}
        self.passed: list[str] = []
        self.failed: dict[str, str] = {}  # test: the last line of its error

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.place), key=lambda i: self.place[i.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.setdefault(report.nodeid, _last_line(report.longrepr))
        elif report.when == "teardown" and report.nodeid not in self.failed:
            self.passed.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed.setdefault(report.nodeid, _last_line(report.longrepr))


class Mapper:
    """Measures which test runs which line, with coverage.py, in this process and in those that it starts."""

    def __init__(self, folder: Path) -> None:
        import coverage

        os.environ |= {
            "COVERAGE_PROCESS_START": str(folder / "coveragerc"),
            CONTEXT: "",
            "SFTLAB_TEST_FRESH_RANKS": "1",
        }
        self.coverage: Any = coverage.process_startup(force=True)
        self.context = ""
        self.tests: dict[str, dict[str, Any]] = {}
        self.fixtures: dict[str, dict[str, Any]] = {}
        self.keys: dict[Any, str] = {}
        self.running = ""  # the test
        self.nested_s = [0.0]  # spent in wider fixtures that the one now set up, or the test, asked for

    def switch(self, context: str) -> None:
        self.context = os.environ[CONTEXT] = context
        self.coverage.switch_context(context)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        _forget()
        context, self.running = f"t{len(self.tests)}", item.nodeid
        self.tests[item.nodeid] = {"context": context, "seconds": 0.0, "outcome": "skipped", "fixtures": []}
        self.switch(context)
        try:
            return (yield)
        finally:
            for name in getattr(item, "fixturenames", ()):
                for definition in getattr(item, "_fixtureinfo").name2fixturedefs.get(name, ()):  # noqa: B009
                    if definition in self.keys:
                        self.tests[item.nodeid]["fixtures"].append(self.keys[definition])
            self.switch("")

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Generator[None, Any, Any]:
        if fixturedef.scope == "function":
            return (yield)
        context = self.keys.setdefault(fixturedef, f"f{len(self.keys)}")
        around, begun = self.context, time.monotonic()
        self.switch(context)
        self.nested_s.append(0.0)
        try:
            return (yield)
        finally:
            took = time.monotonic() - begun
            own = took - self.nested_s.pop()
            self.nested_s[-1] += took
            shared = not fixturedef.baseid.endswith(".py")  # of a conftest.py
            self.fixtures[context] = {"name": fixturedef.argname, "seconds": own, "shared": shared}
            self.tests[self.running]["seconds"] -= own  # pytest counts it as the test's that came first
            self.switch(around)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self.tests[report.nodeid]
        test["seconds"] += report.duration
        if report.failed:
            test["outcome"] = f"failed: {_last_line(report.longrepr)}"
        elif report.when == "call" and report.passed and test["outcome"] == "skipped":
            test["outcome"] = "passed"

    def finish(self) -> dict[str, Any]:
        self.coverage.stop()
        self.coverage.save()
        return {"tests": self.tests, "fixtures": self.fixtures}


def _forget() -> None:
    """Empty all functools caches of tests and source: what they hold would belong to the first test alone."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("tests", "sftlab"):
            for value in list(vars(module).values()):
                if callable(clear := getattr(value, "cache_clear", None)):
                    clear()


def _last_line(longrepr: object) -> str:
    crash = getattr(longrepr, "reprcrash", None)
    text = crash.message if crash else str(longrepr)
    lines = [line for line in text.splitlines() if line.strip()] or [""]
    return (lines[0] if crash else lines[-1])[:200]
