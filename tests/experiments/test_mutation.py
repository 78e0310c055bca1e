"""The mutation command: each operator gives exactly its bugs, and a bug that no test notices is named."""

import ast
import json
from pathlib import Path

import pytest

from experiments.mutation import run
from experiments.mutation.coverage_map import IMPORT_S, Map, measure
from experiments.mutation.operators import Mutant, mutants
from experiments.mutation.worker import Worker


def put_in(source: str) -> set[tuple[str, str]]:
    """Return (operator, the changed lines) of every mutant; each of them must still be Python."""
    found = mutants("module.py", source)
    for mutant in found:
        ast.parse(mutant.apply(source))
    return {(m.operator, m.after) for m in found}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a <= b", {("comparison", "a < b")}),
        ("x = (a) is not (b)  # is not", {("comparison", "x = (a) is (b) # is not")}),
        ("x = a not in b", {("comparison", "x = a in b")}),
        ("x = a < b != c", {("comparison", "x = a <= b != c"), ("comparison", "x = a < b == c")}),
        ("x = a + b * c", {("sign", "x = a - b * c"), ("sign", "x = a + b // c")}),
        ("x = 'é' + a", set()),
        ("x = folder / part", set()),
        ("x -= a", {("sign", "x += a")}),
        ("x = -(a + b)", {("sign", "x = (a + b)"), ("sign", "x = -(a - b)")}),
        ("x = 'é', a[: n]", {("off by one", "x = 'é', a[: n + 1]")}),
        ("x = a[-1]", {("sign", "x = a[1]")}),
        ("x = 3", {("off by one", "x = 4")}),
        ("x = 1000", set()),
        ("x = a and not b", {("boolean", "x = a or not b"), ("boolean", "x = a and b")}),
        ("x = True", {("boolean", "x = False")}),
        ("f(a)", {("dropped call", "pass")}),
        ("x = sorted(a)", {("dropped call", "x = (a)")}),
        ("x = a.clone()", {("dropped call", "x = a")}),
        ("x = f(a, b, c)", {("swapped arguments", "x = f(b, a, c)")}),
        ("x = f(a, a)", set()),
        ("x = max(a, b)", {("min and max", "x = min(a, b)")}),
        (
            "x = [y for y in a if y]",
            {("dropped check", "x = [y for y in a if True]"), ("boolean", "x = [y for y in a if not (y)]")},
        ),
        ("if a:\n    raise ValueError(f'{a + 1}')", {("dropped check", "if False:")}),
        ("x = f(a, b=c, d=e)", {("default for option", "x = f(a, d=e)"), ("default for option", "x = f(a, b=c)")}),
        ("def f(a: int, b: int = 500) -> int:\n    return a, b", {("default for option", "return a, 500")}),
        ("def f(a, b): ...\nx = f(c, b=d)", set()),  # it has to be given
        ("def f(a, b=None): ...\nx = f(c, b=d)", {("default for option", "x = f(c)")}),
        (
            "class A:\n    b: int = 500\n    def c(self): return self.b",
            {("default for option", "def c(self): return 500")},
        ),
        ('def f():\n    """A docstring."""\n    assert a < b, c + d', set()),
        ("if TYPE_CHECKING:\n    f(a)", set()),
        ("class A:\n    def __repr__(self): return a + b", set()),
    ],
)  # fmt: skip
def test_an_operator_gives_exactly_these_bugs(source: str, expected: set[tuple[str, str]]) -> None:
    assert put_in(source) == expected


def test_a_mutant_is_known_by_its_lines_and_not_by_their_number() -> None:
    early, late = mutants("m.py", "x = a < b\n"), mutants("m.py", "\n\nx = a < b\n")
    assert [m.key for m in early] == [m.key for m in late] == [("m.py", "x = a < b", "x = a <= b")]
    assert (early[0].line, late[0].line) == (1, 3)


def test_a_sample_depends_on_the_seed_only_and_takes_from_every_room_and_operator() -> None:
    source = "".join(f"x = {i}\n" for i in range(1, 41)) + "def f(a, b):\n    return a < b\n"
    found = mutants("p/big/a.py", source) + mutants("p/small.py", "x = 1\ny = 2\nz = 3\n")
    drawn = run.draw(found, 12, 0)
    assert drawn == run.draw(found, 12, 0) != run.draw(found, 12, 1)
    assert {run.room(m.file) for m in drawn} == {"big", "small"}
    assert {m.operator for m in drawn} == {"comparison", "off by one"}
    assert len({(m.file, m.line) for m in drawn}) == len(drawn) == 12


TOY = """import functools

LIMIT = 2


def grade(num: int) -> str:
    if num > LIMIT:
        return far(num)
    return "near"


def far(num: int) -> str:
    return str(num + 1)


def unused(num: int) -> bool:
    return num < 0
"""
TOY_TEST = """import functools, subprocess, sys

import pytest
from toy import numbers


@pytest.fixture(scope="module")
def graded():
    return numbers.grade(1)


def test_near(graded):
    assert graded == "near"


def test_near_again(graded):
    assert graded == "near"


def test_far_in_a_process():
    code = "from toy import numbers; print(numbers.grade(5))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert said.stdout == b"6\\n"


def test_broken():
    assert numbers.grade(1) == "far"
"""


def test_a_bug_that_a_test_notices_is_killed_and_one_that_none_does_is_named(tmp_path: Path) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy/__init__.py").touch()
    (tmp_path / "toy/numbers.py").write_text(TOY)
    (tmp_path / "test_toy.py").write_text(TOY_TEST)
    found = {m.after: m for m in run.find(tmp_path, package="toy")}
    worker = Worker(tmp_path, preload=())
    try:
        covering = Map([json.loads(json.dumps(measure(worker, "test_toy.py", ["toy"])))])
        names = {test.partition("::")[2] for test in covering.tests(found["if num >= LIMIT:"])[0]}
        assert names == {"test_near", "test_near_again", "test_far_in_a_process"}  # of a fixture, of a child
        assert list(covering.left_out) == ["test_toy.py::test_broken"]
        trial = run.Trial(tmp_path, covering)

        def outcome(after: str) -> dict[str, object]:
            result = trial.test(worker, found[after])
            assert (worker.tree / "toy/numbers.py").read_text() == TOY
            return result

        killed = outcome("return str(num - 1)")
        assert killed["outcome"] == "killed" and str(killed["killer"]).endswith("test_far_in_a_process")
        survived = outcome("if num >= LIMIT:")  # no test has a number at the limit
        assert survived["outcome"] == "survived" and survived["tests"] == 3
        assert covering.tests(found["LIMIT = 3"]) == covering.tests(found["if num >= LIMIT:"])  # it runs on import
        alone = outcome("return num <= 0")
        assert alone["outcome"] == "survived" and alone["not covered"]
    finally:
        worker.close()
    assert not worker.folder.exists()

    table = run.tables([killed, survived, alone], {("toy/numbers.py", "if num > LIMIT:", "if num >= LIMIT:"): "A toy."})
    assert "| all | 3 | 1 | 0 | 2 | 33 |" in table
    assert "| toy/numbers.py:7 comparison | `if num > LIMIT:` | `if num >= LIMIT:` | A toy. |" in table
    assert "| toy/numbers.py:17 comparison | `return num < 0` | `return num <= 0` | no test runs it |" in table


def test_cheap_tests_come_first_then_one_of_every_file_and_the_limit_counts_fixtures() -> None:
    def line(file: str, seconds: dict[str, float], context: str, shared: bool) -> dict[str, object]:
        tests = {
            f"{file}::{name}": {"context": name, "seconds": s, "outcome": "passed", "fixtures": ["f0"]}
            for name, s in seconds.items()
        }
        fixtures = {"f0": {"name": "made", "seconds": 10.0, "shared": shared}}
        return {"file": file, "tests": tests, "fixtures": fixtures, "lines": {"m.py": {"1": [context]}}}

    covering = Map(
        [
            line("own.py", {"a": 9.0, "b": 2.0, "c": 60.0}, "f0", shared=False),
            line("conf.py", {"a": 3.0, "b": 1.0, "c": 2.0}, "f0", shared=True),
            line("alone.py", {"a": 30.0, "b": 1.0}, "a", shared=False),
        ]
    )
    mutant = mutants("m.py", "def f(): return a < b")[0]
    assert covering.expected(["own.py::b", "own.py::a"]) == 2 + 9 + 10 + IMPORT_S
    assert covering.choose(mutant, 200.0) == [
        *("conf.py::b", "conf.py::c", "alone.py::a"),
        *("own.py::b", "own.py::a", "own.py::c"),
    ]
    assert covering.choose(mutant, 30.0) == ["own.py::b", "own.py::a"]
    assert covering.choose(mutant, 40.0) == ["own.py::b", "own.py::a", "alone.py::a"]  # and one of every other file
    assert covering.choose(mutants("m.py", "\ndef f(): return a < b")[0], 30.0) == []


def test_a_test_that_fails_without_the_bug_kills_nothing(tmp_path: Path) -> None:
    class Scripted:
        """Fails one test whatever is put in."""

        def run(self, tests: list[str], limit: float) -> dict[str, object]:
            bad = [t for t in tests if t == "t.py::bad"]
            return {"outcome": "failed" if bad else "passed", "passed": [t for t in tests if t not in bad],
                    "failed": dict.fromkeys(bad, "no")}  # fmt: skip

        def run_with(self, file: str, text: str, tests: list[str], limit: float) -> dict[str, object]:
            return self.run(tests, limit)

    (tmp_path / "p").mkdir()
    (tmp_path / "p/m.py").write_text("x = a < b\n")
    contexts = {
        name: {"context": name, "seconds": 1.0, "outcome": "passed", "fixtures": []}
        for name in ("t.py::bad", "t.py::good")
    }
    covering = Map([{"file": "t.py", "tests": contexts, "lines": {"p/m.py": {"1": ["t.py::bad", "t.py::good"]}}}])
    mutant: Mutant = mutants("p/m.py", "x = a < b\n")[0]
    result = run.Trial(tmp_path, covering).test(Scripted(), mutant)  # type: ignore[arg-type]
    assert (result["outcome"], result["tests"]) == ("survived", 1)
    assert covering.left_out == {"t.py::bad": "fails without a bug"}
