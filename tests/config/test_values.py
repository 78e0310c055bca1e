"""Whether a value fits an annotation, what was expected in words, and that nobody imports torch to find out."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from sftlab.common.values import Bounds, Count, Positive, Share, Whole, annotations, expected, fits, refusal
from sftlab.config.binding import bind, check_node
from sftlab.config.groups import CONF
from tests.support import REPO


@pytest.mark.parametrize(
    ("annotation", "right", "wrong", "words"),
    [
        (int, [0, -3], [1.0, "1", True, None, [1]], "a whole number"),
        (float, [0, 1.5, float("inf")], ["x", True, float("nan"), None], "a number"),
        (bool, [True, False], [0, 1, "true", None], "true or false"),
        (str, ["", "a"], [1, None, ["a"], False], "a text"),
        (Count, [1, 9], [0, -1, 1.0, "1"], "a whole number of at least 1"),
        (Whole | None, [0, None], [-1, "no"], "a whole number of at least 0, or null"),
        (Positive, [1e-9, 3], [0, -1, "abc"], "a number above 0"),
        (Share, [0, 1, 0.5], [1.01, -0.1], "a number from 0 to 1"),
        (Literal["a", "b"], ["a"], ["c", None, 1], "a or b"),
        (bool | Literal["auto"], [True, "auto"], ["maybe", 1], "true or false, or auto"),
        (Count | Literal["auto"], [4, "auto"], [0, True], "a whole number of at least 1, or auto"),
        (tuple[float, float], [[0.9, 1]], [0.9, [1], [1, 2, 3], ["a", 1]], "a list of 2, each a number"),
        (tuple[int, ...], [[], [1, 2]], [["a"], 3], "a list, each a whole number"),
        (Sequence[str], [[], ["a"]], ["a", [1], None], "a list, each a text"),
        (Mapping[str, float] | None, [{"a": 1}, None], [{"a": "b"}, 3], "{name: value}, each value a number, or null"),
        (dict[str, Any], [{"a": "b"}], ["llama", None], "{name: value}"),
        (Annotated[float, Bounds(least=0, below=1)], [0, 0.99], [1, -1], "a number of at least 0 and below 1"),
        (Any, [1, None, {}], [], ""),
    ],
)
def test_what_fits_an_annotation(annotation: Any, right: list[Any], wrong: list[Any], words: str) -> None:
    assert all(fits(value, annotation) and refusal(value, annotation) is None for value in right)
    assert not any(fits(value, annotation) for value in wrong)
    assert all(refusal(value, annotation) == words for value in wrong)
    assert not words or expected(annotation) == words


def test_a_node_fits_whatever_it_will_make() -> None:
    assert fits({"_target_": "a.b"}, float) and not fits({"a": 1}, float)


def constructor(model: "torch.nn.Module", *, a: Count, b: "Whole | None" = None, c="x") -> None:  # type: ignore  # noqa
    """A function whose first parameter is of a type that is not imported."""


@dataclass(kw_only=True)
class Above:
    """Fields of a base are annotated in the base's module."""

    first: "Literal['x', 'y']" = "x"


@dataclass(kw_only=True)
class Below(Above):
    """And these here."""

    second: "Count" = 1


def test_annotations_are_read_where_they_were_written() -> None:
    assert annotations(constructor) == {"model": Any, "a": Count, "b": Whole | None, "c": Any, "return": None} or (
        annotations(constructor)["model"] is Any and annotations(constructor)["b"] == Whole | None
    )
    assert annotations(Below) == {"first": Literal["x", "y"], "second": Count}


def test_a_partial_needs_its_settings_and_no_more() -> None:
    bind("part", {"a": 1}, constructor, "here", partial=True)
    with pytest.raises(ValueError, match=r"^part\.a is missing: give it a value, part\.a=\.\.\.$"):
        bind("part", {"b": 1}, constructor, "here", partial=True)
    with pytest.raises(ValueError, match=r"^part\.model is missing"):
        bind("part", {"a": 1}, constructor, "here")
    with pytest.raises(ValueError, match=r"^part\.a=0: expected a whole number of at least 1$"):
        bind("part", {"a": 0}, constructor, "here", partial=True)


def test_nodes_in_lists_and_in_nodes_are_checked() -> None:
    wrong = {"_target_": "sftlab.training.schedule.wsd", "_partial_": True, "decay_ratio": 2}
    for node in ({"inner": wrong}, [wrong], {"inner": [{"deep": wrong}]}):
        with pytest.raises(ValueError, match="decay_ratio=2: expected a number from 0 to 1"):
            check_node("any", node)


PROBE = """
import json, sys, time
from sftlab.config.binding import check
from sftlab.config.composing import composed
began = time.process_time()
composed([])
took = time.process_time() - began
for words in json.loads(sys.argv[1]):
    composed(words)
print(json.dumps([took, [name for name in ("torch", "transformers", "datasets") if name in sys.modules]]))
"""


def test_every_option_is_checked_without_torch(tmp_path: Path) -> None:
    """What a constructor's module imports is imported for every check. One of 1 s is felt at every typing error."""
    needs = {"data": ["data.path=x"], "model": ["model.name_or_path=x"]}
    words = ["data.format.prompt='{a}'", "data.format.completion='{b}'"]
    every = [
        [
            f"{file.parent.name}={file.stem}",
            *needs.get(file.parent.name, ()),
            *(words if file.stem == "template" else ()),
        ]
        for file in sorted(CONF.glob("*/*.yaml"))
        if file.stem not in ("base", "mixture") and file.parent.name not in ("experiment", "sweeper", "launcher")
    ]
    assert len(every) > 20
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(every)], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    took_s, heavy = json.loads(done.stdout)
    assert heavy == [], "import these inside the functions of the constructor's module"
    assert took_s < 1.0
