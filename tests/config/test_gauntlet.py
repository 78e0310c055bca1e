"""tests/gauntlet.md names every test of the gauntlet, and no other."""

import ast
import re

from tests.support import REPO

PAGE = (REPO / "tests" / "gauntlet.md").read_text(encoding="utf-8")


def listed() -> dict[str, set[int]]:
    """Return the tests that the page names, each with the numbers that name it."""
    found: dict[str, set[int]] = {}
    for number, body in re.findall(r"^(\d+)\. (.*?)(?=^\d+\. |\Z)", PAGE, re.MULTILINE | re.DOTALL):
        for name in re.findall(r"`(test_\w+)`", body):
            found.setdefault(name, set()).add(int(number))
    return found


def test_the_page_and_the_tests_name_each_other() -> None:
    there = {}
    for file in (REPO / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and (match := re.match(r"test_gauntlet_((?:\d\d_)+)", node.name)):
                there[node.name] = {int(number) for number in match[1].strip("_").split("_")}
    assert listed() == there and len(there) > 40


def test_the_page_says_which_bugs_have_no_test_yet() -> None:
    numbers = [int(n) for n in re.findall(r"^(\d+)\. ", PAGE, re.MULTILINE)]
    assert numbers == list(range(1, 47))
    without = {int(n) for n in re.findall(r"^(\d+)\. (?:(?!^\d+\. ).)*?No test yet", PAGE, re.MULTILINE | re.DOTALL)}
    assert without == set(numbers) - {n for found in listed().values() for n in found}
