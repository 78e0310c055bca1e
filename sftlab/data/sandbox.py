"""The sandbox in which chat templates run: transformers' own, whose single operations have a measure too.

The time limit ends a loop, but not one operation inside C: `10 ** 1000000000` computes for hours, and `'a' * 10 ** 10`
takes all memory. So what goes into such an operation is measured before it is computed.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MOST = 1_000_000  # characters or items that one operation makes of nothing, and bits of a number
MOST_VALUES = 100_000  # of a list, with all that its lists hold: `[x, x]`, 60 times, would take for ever to compare
MOST_TEXT = 256 << 20  # characters of a text that is joined or replaced from others; a row has a quarter of that
FILTERS = (
    *("batch", "center", "format", "indent", "round", "slice", "tojson", "truncate", "wordwrap"),  # these take a number
    *("join", "replace", "sum", "urlize"),  # these multiply what they are given
)
MEASURED = (str, bytes, int)  # their methods make texts
WIDE = re.compile(r"%[^%a-zA-Z]*(\d{7,}|\*)")  # a width in a format; `*` takes one from the values
WIDE_FIELD = re.compile(r"\{[^{}]*:[^{}]*(\d{7,}|\{)")  # the same in str.format; a field in a field is a width, too


class Generator(CodeGenerator):
    """Jinja's compiler; lists are measured when they are made, and `a ~ b` is joined as all other texts are."""

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        """Write the code of a list."""
        self._measured(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        """Write the code of an object."""
        self._measured(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        """Write the code of a tuple: of values, or of names that are assigned."""
        if node.ctx == "load":
            self._measured(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def _measured(self, visit: Callable[..., None], node: Any, frame: Frame) -> None:
        if all(isinstance(item, nodes.Const) for item in node.items):
            visit(node, frame)
            return
        self.write("environment.small(")
        visit(node, frame)
        self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """Write the code of `~`."""
        self.write("environment.concat((")
        for part in node.nodes:
            self.write("str(")
            self.visit(part, frame)
            self.write("), ")
        self.write("))")


class Names(Namespace):
    """A namespace that is not shown with all that it holds, which may be namespaces."""

    def __repr__(self) -> str:
        return "<Namespace>"


def small(value: Any) -> Any:
    """Return a list, a tuple or an object. Raises: SecurityError if it holds too many values, repeated ones counted."""
    todo, count = [value], 0
    while todo:
        node = todo.pop()
        if isinstance(node, Mapping):
            todo += node.values()
        elif isinstance(node, list | tuple):
            todo += node
        count += 1
        if count > MOST_VALUES or len(todo) > MOST_VALUES:
            raise SecurityError(f"a template makes no list of more than {MOST_VALUES:,} values")
    return value


def joined(parts: Iterable[str]) -> str:
    """Return texts as one."""
    kept, total = [], 0
    for part in parts:
        total += len(part)
        if total > MOST_TEXT:
            raise too_long()
        kept.append(part)
    return "".join(kept)


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a measure. Raises: SecurityError for an operation that exceeds it."""

    intercepted_binops = frozenset(("*", "**", "%"))
    code_generator_class = Generator
    concat = staticmethod(joined)
    small = staticmethod(small)

    def from_string(self, source: Any, *args: Any, **kwargs: Any) -> Any:
        """Compile a template. Only now has the environment all its filters: transformers adds some of its own."""
        for name in FILTERS:
            self.filters[name] = measured(name, self.filters[name])
        self.globals["namespace"] = Names
        return super().from_string(source, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute one operation."""
        if operator == "%" and isinstance(left, str):
            refuse_format(left, right if isinstance(right, tuple | Mapping) else (right,))
        elif operator != "%":
            refuse_large(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function; a method of a text or a number (center, replace, to_bytes) makes no great text."""
        owner = getattr(__obj, "__self__", None)
        if (args or kwargs) and isinstance(owner, MEASURED):
            args = measure(__obj.__name__, owner, args, kwargs)
        elif len(args) + len(kwargs) > 1:  # dict(a=x, b=x)
            small([*args, *kwargs.values()])
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return the sandbox's own str.format, which makes no great text."""
        format = super().wrap_str_format(value)
        if format is None:
            return None

        def run(*args: Any, **kwargs: Any) -> str:
            named = args[0] if value.__name__ == "format_map" and args and isinstance(args[0], Mapping) else kwargs
            refuse_format(value.__self__, (*args, *named.values()))
            return str(format(*args, **kwargs))

        return run


def measured(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that makes no great text or list."""
    if hasattr(function, "is_measured"):
        return function

    @functools.wraps(function)  # with the marks by which Jinja knows what else to pass
    def run(*args: Any, **kwargs: Any) -> Any:
        refuse_numbers(args, kwargs)
        marked = hasattr(function, "jinja_pass_arg")
        about, (value, *rest) = args[:marked], args[marked:]
        if name == "format":
            refuse_format(str(value), (*rest, *kwargs.values()))
        elif name in ("indent", "tojson", "urlize", "wordwrap"):  # the arguments may stand once per line or word
            width = max((v for v in (*rest, *kwargs.values()) if name == "indent" and isinstance(v, int)), default=1)
            size = len(value) if hasattr(value, "__len__") else 1
            refuse_text(size * max(width, longest((*rest, *kwargs.values()))))
        elif name == "replace":
            measure(name, str(value), tuple(map(str, (*rest, *kwargs.values()))), {})
        elif name == "join":
            value = list(value)
            text = str(kwargs.get("d", rest[0] if rest else ""))
            measure(name, text, ([str(v) for v in value],), {})
        elif name == "sum":
            value = list(value)
            refuse_text(sum(len(v) for v in value if hasattr(v, "__len__")) * len(value))  # each sum is a new list
        return function(*about, value, *rest, **kwargs)

    run.is_measured = True  # type: ignore[attr-defined]
    return run


def measure(name: str, text: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the arguments for a method of a value. Raises: SecurityError if it would make a great text of it."""
    refuse_numbers(args, kwargs)
    if not isinstance(text, str | bytes):
        return args
    if name == "replace" and len(args) > 1:
        refuse_text((len(text) // max(1, len(args[0])) + 1) * len(args[1]))
    elif name == "join" and args:
        args = (list(args[0]),)
        refuse_text(len(text) * len(args[0]) + sum(map(len, args[0])))
    elif name == "translate" and args:
        values = args[0].values() if isinstance(args[0], Mapping) else args[0]
        refuse_text(len(text) * longest(values))
    elif name == "expandtabs":
        refuse_text(len(text) * max(8, *args, *kwargs.values()))
    return args


def longest(values: Iterable[Any]) -> int:
    """Return the length of the longest text among values."""
    return max((len(v) for v in values if isinstance(v, str)), default=1)


def refuse_numbers(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise SecurityError if there is a number above MOST among the arguments."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and abs(value) > MOST:
            raise SecurityError(f"a template makes no text or list of {value:,} characters or items")


def refuse_format(text: str, values: Iterable[Any]) -> None:
    """Raise SecurityError for a format with a width that fills memory, or with many long values."""
    if WIDE.search(text) or WIDE_FIELD.search(text):
        raise SecurityError(f"a template's format has no width as in {text[:40]!r}")
    values = values.values() if isinstance(values, Mapping) else values
    refuse_text((text.count("%") + text.count("{")) * longest(values))


def refuse_text(length: int) -> None:
    """Raise SecurityError if a text would be longer than MOST_TEXT."""
    if length > MOST_TEXT:
        raise too_long()


def too_long() -> SecurityError:
    """Return the error for a text that is."""
    return SecurityError(f"a template makes no text of more than {MOST_TEXT:,} characters")


def refuse_large(operator: str, left: Any, right: Any) -> None:
    """Raise SecurityError if a product or a power is larger than MOST characters, items or bits."""
    if isinstance(left, int) and isinstance(right, int):
        large = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
    else:
        many, times = (right, left) if isinstance(left, int) else (left, right)
        sized = isinstance(many, str | list | tuple | bytes) and isinstance(times, int)
        large = len(many) * times if sized else 0
    if large > MOST:
        raise SecurityError(f"a template computes no {operator} of such values: the result is too large")
