"""Values: whether what was typed fits the annotation of the parameter that takes it, and what was expected in words.

A constructor's signature is the schema of its settings, so the annotation says everything: the type, the choices
(`Literal`), and the bounds of a number (`Annotated[float, Bounds(above=0)]`). config/binding.py checks every value
of a config with it before anything is made, config/schema.py shows the same to editors.
"""

import functools
import inspect
import math
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any, Literal, Union, get_args, get_origin

NoneType = type(None)


@dataclass(frozen=True)
class Bounds:
    """What a number may be. `note` is said where a value does not fit, for a mistake that people make."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    note: str = ""

    def allow(self, number: float) -> bool:
        """Return whether a number lies within."""
        return (
            (self.least is None or number >= self.least)
            and (self.above is None or number > self.above)
            and (self.most is None or number <= self.most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        if self.least is not None and self.most is not None:
            return f"from {self.least:g} to {self.most:g}"
        words = {"of at least": self.least, "above": self.above, "of at most": self.most, "below": self.below}
        return " and ".join(f"{word} {bound:g}" for word, bound in words.items() if bound is not None)


Count = Annotated[int, Bounds(least=1)]
Whole = Annotated[int, Bounds(least=0)]
Positive = Annotated[float, Bounds(above=0)]
NotNegative = Annotated[float, Bounds(least=0)]
Share = Annotated[float, Bounds(least=0, most=1)]


def refusal(value: Any, annotation: Any) -> str | None:
    """Return what was expected instead of a value, in words; None if the value fits, or if nobody can tell.

    A node with a `_target_` fits: what it makes is checked when it is made.
    """
    return None if fits(value, annotation) else "; ".join(filter(None, (expected(annotation), note(annotation))))


def fits(value: Any, annotation: Any) -> bool:
    """Return whether a value of a config is one of an annotation's."""
    if isinstance(value, Mapping) and "_target_" in value:
        return True
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inside = [bounds for bounds in arguments[1:] if isinstance(bounds, Bounds)]
        return fits(value, arguments[0]) and all(bounds.allow(value) for bounds in inside)
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in arguments)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in arguments)
    if origin is tuple:
        endless = len(arguments) == 2 and arguments[1] is Ellipsis
        kinds = [arguments[0]] * len(value) if endless and is_list(value) else arguments
        return is_list(value) and len(value) == len(kinds) and all(map(fits, value, kinds))
    if is_kind(origin, Mapping):
        return isinstance(value, Mapping) and all(fits(inner, arguments[1]) for inner in value.values())
    if is_kind(origin, Sequence):
        return is_list(value) and all(fits(inner, arguments[0]) for inner in value)
    return fits_plain(value, annotation)


def fits_plain(value: Any, annotation: Any) -> bool:
    """Return whether a value is of a type without arguments. A type of which nothing is known takes everything."""
    if annotation in (None, NoneType):
        return value is None
    if annotation is bool:
        return isinstance(value, bool)
    if annotation is int:
        return a_number(value) and isinstance(value, int)
    if annotation is float:
        return a_number(value)
    if annotation is str:
        return isinstance(value, str | date)  # YAML reads 2026-01-31 as a date
    if is_kind(annotation, Mapping):
        return isinstance(value, Mapping)
    if is_kind(annotation, Sequence):
        return is_list(value)
    if inspect.isclass(annotation) and annotation not in (Any, object):
        return isinstance(value, annotation)
    return True


def a_number(value: Any) -> bool:
    """Return whether a value is a number; true and NaN are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def expected(annotation: Any) -> str:
    """Return what an annotation takes, in words: `a whole number of at least 1, or null`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        bounds = " ".join(str(extra) for extra in arguments[1:] if isinstance(extra, Bounds))
        return f"{expected(arguments[0])} {bounds}".rstrip()
    if origin in (Union, types.UnionType):
        words = [expected(option) for option in arguments]
        return words[0] + "".join(f", or {word}" for word in words[1:])
    if origin is Literal:
        return or_list(arguments)
    if origin is tuple and Ellipsis not in arguments:
        return f"a list of {len(arguments)}, each {each(arguments[0])}"
    if origin is tuple or is_kind(origin, Sequence):
        return f"a list, each {each(arguments[0])}"
    if is_kind(origin, Mapping):
        return "{name: value}" if arguments[1] is Any else f"{{name: value}}, each value {each(arguments[1])}"
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", NoneType: "null"}
    if annotation in plain:
        return plain[annotation]
    if is_kind(annotation, Mapping):
        return "{name: value}"
    if is_kind(annotation, Sequence):
        return "a list"
    return f"a {getattr(annotation, '__name__', 'part')}, {{_target_: ...}}"


def each(annotation: Any) -> str:
    """Return what an annotation takes, in brackets where it offers several things."""
    words = expected(annotation)
    return f"({words})" if ", or " in words else words


def note(annotation: Any) -> str:
    """Return the notes of an annotation's bounds."""
    found = (part for part in flat(annotation) if isinstance(part, Bounds))
    return "; ".join(bounds.note for bounds in found if bounds.note)


def flat(annotation: Any) -> Iterable[Any]:
    """Yield an annotation and all that it is made of."""
    yield annotation
    for part in get_args(annotation):
        yield from flat(part)


def or_list(options: Sequence[Any]) -> str:
    """Return `a or b`, or `one of a, b, c`."""
    words = [as_typed(option) for option in options]
    return " or ".join(words) if len(words) < 3 else f"one of {', '.join(words)}"


def as_typed(value: Any) -> str:
    """Return a value as a person types it."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {as_typed(inner)}' for key, inner in value.items())}}}"
    if is_list(value):
        return f"[{', '.join(map(as_typed, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def is_list(value: Any) -> bool:
    """Return whether a value is a list of a config."""
    return isinstance(value, list | tuple)


def is_kind(annotation: Any, kind: type) -> bool:
    """Return whether an annotation is a class of a kind; text is no sequence here."""
    return inspect.isclass(annotation) and issubclass(annotation, kind) and not issubclass(annotation, str)


@functools.cache
def annotations(constructor: Callable[..., Any]) -> Mapping[str, Any]:
    """Return the annotation of each parameter of a constructor; `Any` for one that cannot be read without an import.

    Types of torch stand in quotes there, and are imported for the type checker only, so that a config is checked fast.
    """
    made = {}
    for name, parameter in inspect.signature(constructor).parameters.items():
        annotation = parameter.annotation
        if isinstance(annotation, str):
            try:
                annotation = eval(annotation, home(constructor, name))
            except (NameError, TypeError, SyntaxError, AttributeError):
                annotation = Any
        made[name] = Any if annotation is inspect.Parameter.empty else annotation
    return made


def home(constructor: Callable[..., Any], name: str) -> dict[str, Any]:
    """Return the names of the module in which a parameter was annotated: of a field, that of the class which has it."""
    lineage = constructor.__mro__ if inspect.isclass(constructor) else ()
    owner = next((c for c in lineage if name in inspect.get_annotations(c)), inspect.unwrap(constructor))
    return vars(sys.modules[owner.__module__])
