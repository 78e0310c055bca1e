"""The bugs: what each operator puts into a source text. Nothing here runs a test.

A mutant replaces one span of characters, found from the syntax tree's positions, so that lines and comments stay. It is
known by its file and by the text of its lines before and after, which outlives a shift of lines.

Left alone: annotations, docstrings and every other string, `__repr__`, `assert`, the words of `raise`, of warnings and
of logs, `if TYPE_CHECKING`, and bugs that change nothing by construction (a default put in place of the same value,
swapped arguments that are equal, digits of a timeout or an indent).
"""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

COMPARISONS = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
SIGNS = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "//"),
    ast.FloorDiv: ("//", "*"),
    ast.Div: ("/", "*"),
}
OPPOSITES = {"min": "max", "max": "min", "any": "all", "all": "any"}
WRAPPERS = {"sorted", "abs", "reversed", "deepcopy", "round"}  # f(x) becomes x
METHODS = {"clone", "copy", "strip", "lower"}  # x.f() becomes x
QUIET_CALLS = {"warn", "debug", "info", "warning", "cast", "TypeVar", "sleep", "getLogger"}
UNSWAPPABLE = {
    *("isinstance", "issubclass", "getattr", "setattr", "hasattr", "min", "max", "print", "Path", "empty", "full"),
}
# Keywords of the standard library and of torch whose loss no test should have to notice.
IDLE_KEYWORDS = {
    "encoding", "newline", "errors", "ensure_ascii", "strict", "daemon", "timeout", "indent", "stacklevel", "exist_ok",
    "parents", "flush", "kw_only", "frozen", "slots", "text", "file", "separators", "transient", "no_wrap", "style",
    "justify", "help", "description", "name",
}  # fmt: skip
FINE_NUMBERS = IDLE_KEYWORDS | {"dim", "axis", "width", "digits", "maxsplit", "level", "padding", "precision", "eps"}
PATHS = (
    *("path", "folder", "dir", "root", "file", "home", "here", "conf", "repo", "cache", "target", "name"),
    *("partial", "output"),
)
LARGEST = 256  # a larger constant is a size, a port or a mask: one more is no bug


@dataclass(frozen=True)
class Mutant:
    """One bug: `file[start:end]` (characters) becomes `text`. `before` and `after` are its lines, on one line each."""

    file: str
    line: int
    statement: int  # the line where its statement begins
    operator: str
    start: int
    end: int
    text: str
    before: str
    after: str
    fixed: bool  # outside any function: runs when the module is imported

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is known by, whatever its line."""
        return self.file, self.before, self.after

    def apply(self, source: str) -> str:
        """Return the source with the bug in."""
        return source[: self.start] + self.text + source[self.end :]


@dataclass
class Defaults:
    """The source of every constant default in the package, and which parameters have to be given."""

    callables: dict[str, dict[str, str | None]] = field(default_factory=dict)  # None: has to be given
    twice: set[str] = field(default_factory=set)  # names that stand for several callables: not known

    def add(self, name: str, parameters: dict[str, str | None]) -> None:
        """Note a callable; a name that is met twice with other parameters is forgotten."""
        if name in self.callables and self.callables[name] != parameters:
            self.twice.add(name)
        self.callables[name] = parameters

    def of(self, name: str) -> dict[str, str | None] | None:
        """Return {parameter: its default} of a callable of the package, None if there is none of that name."""
        return None if name in self.twice else self.callables.get(name)


def read_defaults(sources: Mapping[str, str]) -> Defaults:
    """Return the defaults of all functions, constructors and dataclasses in these files."""
    found = Defaults()
    for source in sources.values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name != "__init__":
                found.add(node.name, _parameters(node))
            elif isinstance(node, ast.ClassDef):
                found.add(node.name, _constructor(node))
    return found


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, str | None]:
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    found: dict[str, str | None] = {p.arg: None for p in plain}
    found |= {p.arg: ast.unparse(d) for p, d in zip(plain[::-1], a.defaults[::-1], strict=False)}
    found |= {p.arg: d and ast.unparse(d) for p, d in zip(a.kwonlyargs, a.kw_defaults, strict=True)}
    return found


def _constructor(node: ast.ClassDef) -> dict[str, str | None]:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _parameters(item)
    fields = [i for i in node.body if isinstance(i, ast.AnnAssign) and isinstance(i.target, ast.Name)]
    return {i.target.id: i.value and ast.unparse(i.value) for i in fields if isinstance(i.target, ast.Name)}


def mutants(file: str, source: str, defaults: Defaults | None = None) -> list[Mutant]:
    """Return every mutant of a file in the order of its text."""
    found = _Finder(file, source, defaults or read_defaults({file: source}))
    found.visit(ast.parse(source))
    unique = {(m.start, m.end, m.text): m for m in found.mutants}
    return sorted(unique.values(), key=lambda m: (m.start, m.end, m.text))


class _Finder(ast.NodeVisitor):
    """Walks a module, keeps to what may be mutated, and knows the function that it is in."""

    def __init__(self, file: str, source: str, defaults: Defaults) -> None:
        self.file, self.source, self.defaults = file, source, defaults
        self.mutants: list[Mutant] = []
        self.begins = [0]  # of each line, in characters
        for line in source.splitlines(keepends=True):
            self.begins.append(self.begins[-1] + len(line))
        self.lines = source.splitlines()
        self.statement = 1
        self.known: list[dict[str, str]] = []  # of the functions around: {parameter: its constant default}
        self.fields: list[dict[str, str | None]] = []  # of the classes around: {attribute: its default}

    # Places and replacements

    def place(self, line: int, byte: int) -> int:
        """Return the character at an ast position, whose columns count bytes."""
        return self.begins[line - 1] + len(self.lines[line - 1].encode()[:byte].decode())

    def span(self, node: ast.AST) -> tuple[int, int]:
        assert isinstance(node, ast.expr | ast.stmt | ast.keyword)
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self.place(node.lineno, node.col_offset), self.place(node.end_lineno, node.end_col_offset)

    def text(self, node: ast.AST) -> str:
        start, end = self.span(node)
        return self.source[start:end]

    def put(self, operator: str, start: int, end: int, text: str) -> None:
        """Note the mutant that has `text` in place of source[start:end]."""
        line = self.source.count("\n", 0, start) + 1
        first = self.source.rfind("\n", 0, start) + 1
        last = self.source.find("\n", end)
        last = len(self.source) if last < 0 else last
        before = " ".join(self.source[first:last].split())
        after = " ".join((self.source[first:start] + text + self.source[end:last]).split())
        if before != after:
            fixed = not self.known
            self.mutants.append(
                Mutant(self.file, line, self.statement, operator, start, end, text, before, after, fixed)
            )

    def replace(self, operator: str, node: ast.AST, text: str) -> None:
        self.put(operator, *self.span(node), text)

    def between(self, operator: str, left: ast.expr, right: ast.expr, old: str, new: str) -> None:
        """Replace the operator's token between two operands."""
        start, end = self.span(left)[1], self.span(right)[0]
        bare = re.sub(r"#.*", lambda comment: " " * len(comment[0]), self.source[start:end])
        if found := re.search(r"\s+".join(map(re.escape, old.split())), bare):
            self.put(operator, start + found.start(), start + found.end(), new)

    # What is left alone

    def visit(self, node: ast.AST) -> None:
        around = self.statement
        if isinstance(node, ast.stmt):
            self.statement = node.lineno
        super().visit(node)
        self.statement = around

    def generic_visit(self, node: ast.AST) -> None:
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "type_params", "decorator_list"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    self.visit(child)

    def visit_Assert(self, node: ast.Assert) -> None: ...

    def visit_Raise(self, node: ast.Raise) -> None: ...

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None: ...  # Python 3.11 has no right positions inside

    def visit_Assign(self, node: ast.Assign) -> None:
        names = {t.id for t in node.targets if isinstance(t, ast.Name)}
        if not names & {"__all__", "__version__", "__slots__"}:
            self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        if node.name in ("__repr__", "__str__"):
            return
        parameters = {k: v for k, v in _parameters(node).items() if v is not None and _constant(v)}
        for default in [*node.args.defaults, *node.args.kw_defaults]:
            if default is not None:
                self.visit(default)
        self.known.append(parameters)
        for statement in node.body:
            self.visit(statement)
        self.known.pop()

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.fields.append(_constructor(node))
        around, self.known = self.known, []
        for statement in node.body:
            self.visit(statement)
        self.known = around
        self.fields.pop()

    # The operators

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        if not any(isinstance(o, ast.Name) and o.id in ("TYPE_CHECKING", "__name__") for o in operands):
            for op, left, right in zip(node.ops, operands, operands[1:], strict=False):
                self.between("comparison", left, right, *COMPARISONS[type(op)])
            self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if type(node.op) in SIGNS and not self.joins(node.left, node.op) and not self.joins(node.right, node.op):
            self.between("sign", node.left, node.right, *SIGNS[type(node.op)])
        if isinstance(node.op, ast.LShift | ast.RShift):
            self.visit(node.left)
        else:
            self.generic_visit(node)

    def joins(self, operand: ast.expr, op: ast.operator) -> bool:
        """Say whether the operand is text, a list or a path, on which another sign is a TypeError and no likely bug."""
        if isinstance(operand, ast.JoinedStr | ast.List | ast.Tuple | ast.Dict | ast.ListComp):
            return True
        if isinstance(operand, ast.Constant) and isinstance(operand.value, str | bytes):
            return True
        if isinstance(operand, ast.BinOp):
            return self.joins(operand.left, op) or self.joins(operand.right, op)
        last = _last_name(operand)
        return isinstance(op, ast.Div) and (last.isupper() or last.lower().endswith(PATHS))

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if isinstance(node.op, ast.Add | ast.Sub) and not self.joins(node.value, node.op):
            old, new = ("+=", "-=") if isinstance(node.op, ast.Add) else ("-=", "+=")
            start, end = self.span(node.target)[1], self.span(node.value)[0]
            at = start + self.source[start:end].index(old)
            self.put("sign", at, at + 2, new)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        text = self.text(node.operand)
        bare = f"({text})" if isinstance(node.operand, ast.BinOp | ast.BoolOp | ast.IfExp) else text
        if isinstance(node.op, ast.Not):
            self.replace("boolean", node, bare)
        elif isinstance(node.op, ast.USub):
            self.replace("sign", node, bare)
            if isinstance(node.operand, ast.Constant):
                return
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            self.between("boolean", left, right, old, new)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if type(node.value) is int and abs(node.value) < LARGEST and self.text(node).isdigit():
            self.replace("off by one", node, str(node.value + 1))
        elif type(node.value) is bool:
            self.replace("boolean", node, str(not node.value))

    def visit_Slice(self, node: ast.Slice) -> None:
        for bound in (node.lower, node.upper):
            if bound is not None and not isinstance(bound, ast.Constant | ast.UnaryOp):
                self.replace("off by one", bound, f"{self.text(bound)} + 1")
        if isinstance(node.step, ast.UnaryOp):
            node.step = None  # [::-1]: its other signs are no likely bug
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node.body[0], ast.Raise | ast.Continue | ast.Break) or (
            isinstance(node.body[0], ast.Return) and node.body[0].value is None
        ):
            self.replace("dropped check", node.test, "False")
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self.replace("dropped check", test, "True")
            if not isinstance(test, ast.Compare | ast.UnaryOp):
                self.replace("boolean", test, f"not ({self.text(test)})")
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant):
            return  # a docstring
        call = node.value.value if isinstance(node.value, ast.Await) else node.value
        if isinstance(call, ast.Call) and _last_name(call.func) not in QUIET_CALLS:
            self.replace("dropped call", node, "pass")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = _last_name(node.func)
        if name in QUIET_CALLS:
            return
        if isinstance(node.func, ast.Name):
            if name in OPPOSITES:
                self.replace("min and max", node.func, OPPOSITES[name])
            elif name in WRAPPERS and node.args and not isinstance(node.args[0], ast.GeneratorExp | ast.Constant):
                self.replace("dropped call", node, f"({self.text(node.args[0])})")
        elif isinstance(node.func, ast.Attribute) and name in METHODS and not node.args:
            self.replace("dropped call", node, self.text(node.func.value))
        self.swap(node, name)
        self.drop_keywords(node, name)
        self.visit(node.func)
        for argument in node.args:
            if not (name == "round" and argument is not node.args[0]):
                self.visit(argument)
        for keyword in node.keywords:
            if keyword.arg not in FINE_NUMBERS:
                self.visit(keyword.value)

    def swap(self, node: ast.Call, name: str) -> None:
        """Swap the first two positional arguments."""
        if len(node.args) < 2 or name in UNSWAPPABLE:
            return
        first, second = node.args[:2]
        if any(isinstance(a, ast.Starred | ast.JoinedStr | ast.Lambda) for a in (first, second)):
            return
        if all(isinstance(a, ast.Constant) and isinstance(a.value, str) for a in (first, second)):
            return
        a, b = self.text(first), self.text(second)
        start, middle, rest, end = *self.span(first), *self.span(second)
        if a != b:
            self.put("swapped arguments", start, end, b + self.source[middle:rest] + a)

    def drop_keywords(self, node: ast.Call, name: str) -> None:
        """Drop each keyword argument that the callee could do without: known of the package's own, likely of others."""
        own = self.defaults.of(name)
        if name in self.defaults.twice:
            return
        for keyword in node.keywords:
            if keyword.arg is None or name in ("dict", "field", "replace", "dataclass"):
                continue
            if own is None and keyword.arg in IDLE_KEYWORDS:
                continue
            if own is not None and own.get(keyword.arg) in (None, ast.unparse(keyword.value)):
                continue  # has to be given, or is the default
            start, end = self.span(keyword)
            following = self.source[end:].lstrip()
            if following.startswith(","):
                end = self.source.index(",", end) + 1
                end += len(self.source[end:]) - len(self.source[end:].lstrip(" "))
            else:
                before = self.source[:start].rstrip()
                start = len(before) - 1 if before.endswith(",") else start
            self.put("default for option", start, end, "")

    def visit_Name(self, node: ast.Name) -> None:
        default = self.known[-1].get(node.id) if self.known else None
        if default is not None and isinstance(node.ctx, ast.Load):
            self.replace("default for option", node, default)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            default = self.fields[-1].get(node.attr) if self.fields and _last_name(node.value) == "self" else None
            if _last_name(node.value).endswith("settings"):
                classes = [c for n, c in self.defaults.callables.items() if n.endswith("Settings") and node.attr in c]
                default = classes[0][node.attr] if len(classes) == 1 else None
            if default is not None and _constant(default):
                self.replace("default for option", node, default)
                return
        self.generic_visit(node)


def _last_name(node: ast.expr) -> str:
    """Return `c` of a.b.c, of c and of a.b.c(...)."""
    if isinstance(node, ast.Call):
        return _last_name(node.func)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _constant(source: str) -> bool:
    try:
        ast.literal_eval(source)
    except ValueError:
        return False
    return True
