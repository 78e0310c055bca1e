"""Scores of generated tool calls: the name, whether the arguments are valid JSON, and whether they are equal.

Every template writes calls in its own way, and an answer is what is left of that without special tokens. So a call is
looked for in the forms that templates have: a JSON object, a name before a JSON object, a Python call, or tags.
"""

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Call = tuple[str, Any]  # name and arguments; arguments are None where they cannot be read
ARGUMENTS = ("arguments", "parameters", "args", "input")
SCORES = ("tool_name", "tool_valid_json", "tool_arguments")
TAGGED = re.compile(r"<function=([\w.-]+)>(.*?)</function>", re.DOTALL)  # Qwen 3 Coder, Nemotron 3
PARAMETER = re.compile(r"<parameter=([\w.-]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
GLM = re.compile(r"<tool_call>\s*([\w.-]+)\s*(.*?)</tool_call>", re.DOTALL)
GLM_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
NAME_BEFORE = re.compile(r"([A-Za-z_][\w.-]*)\W*?(?:json|code)?\W*$")
# gpt-oss's thought and the header behind it; `<|channel|>` and its like are left out of a decoded answer.
ANALYSIS = re.compile(r"\A\s*analysis.*?assistant(?=final|commentary| to=)", re.DOTALL)
TO = re.compile(r"(to=functions\.[\w.-]+?)commentary\b")  # gpt-oss's name of a function, and that of its channel
PYTHON = re.compile(r"\[?\s*[A-Za-z_][\w.]*\(.*\)\s*\]?", re.DOTALL)


def tool_call_scores(answer: str, references: Sequence[str]) -> dict[str, float]:
    """Return the scores of an answer against references that are calls, each from 0 to 1; empty if none is a call.

    Of several calls each counts by its place, and a call too many counts as a wrong one.
    """
    wanted = [calls for calls in map(reference_calls, references) if calls is not None]
    if not wanted:
        return {}
    given = calls_in(without_thought(answer))
    scored = [compared(given, calls) for calls in wanted]
    return dict(zip(SCORES, max(scored), strict=True))


def reference_calls(reference: str) -> list[Call] | None:
    """Return the calls that a reference holds; None if it is plain text."""
    if not reference.startswith('{"tool_calls"'):
        return None
    try:
        return [(c["name"], c["arguments"]) for c in json.loads(reference)["tool_calls"]]
    except (ValueError, LookupError, TypeError):
        return None


def compared(given: Sequence[Call], wanted: Sequence[Call]) -> tuple[float, float, float]:
    """Return which share of the calls has the right name, readable arguments, and equal arguments."""
    pairs = list(zip(given, wanted, strict=False))
    most = max(len(given), len(wanted))
    name = sum(g[0] == w[0] for g, w in pairs)
    valid = sum(g[1] is not None for g, _ in pairs)
    equal = sum(g[0] == w[0] and g[1] == w[1] for g, w in pairs)
    return name / most, valid / most, equal / most


def calls_in(text: str) -> list[Call]:
    """Return the calls of an answer, in order."""
    if found := TAGGED.findall(text):
        return [
            (name, parsed_arguments(body) if body.lstrip().startswith("{") else typed(PARAMETER.findall(body)))
            for name, body in found
        ]
    if "<arg_key>" in text:
        return [(name, typed(GLM_ARGUMENT.findall(body))) for name, body in GLM.findall(text)]
    return list(json_calls(text)) or python_calls(text)


def json_calls(text: str) -> Iterator[Call]:
    """Yield calls that are written as JSON: an object with name and arguments, or a name before its arguments."""
    decoder, at = json.JSONDecoder(strict=False), 0
    text = TO.sub(r"\1 ", text)
    while (start := text.find("{", at)) >= 0:
        before = NAME_BEFORE.search(text[at:start].removesuffix("json").rstrip())
        try:
            value, at = decoder.raw_decode(text, start)
        except ValueError:
            name = re.search(r'"name"\s*:\s*"([^"]*)"', text[start:])
            if name or before:
                yield (name[1] if name else short(before[1]) if before else "", None)
            return
        function = value.get("function", value) if isinstance(value, Mapping) else {}
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            arguments: Any = next((function[key] for key in ARGUMENTS if key in function), {})
            yield function["name"], parsed_arguments(arguments)
        elif before:
            yield short(before[1]), value


def short(name: str) -> str:
    """Return a function's name without the namespace that gpt-oss puts before it."""
    return name.removeprefix("functions.")


def parsed_arguments(arguments: Any) -> Any:
    """Return arguments as an object; None if they are text that is no JSON."""
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except ValueError:
        return None


def python_calls(text: str) -> list[Call]:
    """Return calls that are written as Python: `[add(a=1, b=2)]`."""
    match = PYTHON.search(text)
    try:
        body = ast.parse(match.group().strip(), mode="eval").body if match else None
    except (SyntaxError, ValueError):
        name = re.search(r"([A-Za-z_][\w.]*)\(", text)
        return [(name[1], None)] if name else []
    nodes = body.elts if isinstance(body, ast.List) else [body]
    return [python_call(node) for node in nodes if isinstance(node, ast.Call)]


def python_call(node: ast.Call) -> Call:
    """Return one call; arguments are None if one is no literal."""
    name = ast.unparse(node.func)
    try:
        return name, {k.arg: ast.literal_eval(k.value) for k in node.keywords}
    except ValueError:
        return name, None


def typed(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return arguments from tags, each value as JSON where it is that."""
    found = {}
    for key, value in pairs:
        try:
            found[key.strip()] = json.loads(value)
        except ValueError:
            found[key.strip()] = value.strip("\n")
    return found


def without_thought(answer: str) -> str:
    """Return an answer without the reasoning before it: what ends in `</think>`, or gpt-oss's channel `analysis`."""
    return ANALYSIS.sub("", answer.rpartition("</think>")[2], count=1)


def said(answer: str) -> list[str]:
    """Return what an answer may say: its words as they are, and without the name of gpt-oss's channel before them."""
    words = without_thought(answer)
    return [words, words.lstrip().removeprefix("final")]
