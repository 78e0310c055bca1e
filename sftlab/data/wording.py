"""Wordings: templates in a config that turn columns into text, as `{column}` or as sandboxed Jinja.

A value reaches the text only if it is text, a number or a truth value: `None` or a list would be printed as Python
prints them, so they are errors that say what to write instead.
"""

import re
from typing import Any

from jinja2 import StrictUndefined, TemplateError, UndefinedError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sftlab.data.format import Fields, MissingColumn, Row, field

JINJA = re.compile(r"\{[{%#]")
COLUMN = re.compile(r"\{([^{}\"'\n]+)\}")


class Wording:
    """A template and the columns that it names. Raises: ValueError if it is no template; `key` is its setting."""

    def __init__(self, template: str, key: str) -> None:
        if not isinstance(template, str):
            raise ValueError(f"{key}: expected a template, a text with {{column}} in it; found {template!r}")
        self.template, self.key = template, key
        self.jinja = None
        self.columns = list(dict.fromkeys(COLUMN.findall(template)))
        if JINJA.search(template):
            environment = ImmutableSandboxedEnvironment(
                undefined=StrictUndefined, keep_trailing_newline=True, finalize=printed
            )
            try:
                self.jinja = environment.from_string(template)
                free = meta.find_undeclared_variables(environment.parse(template))
                self.columns = sorted(free - {"row", *environment.globals})
            except TemplateError as error:
                raise ValueError(f"{key}: this is not a Jinja template ({error}): {template!r}") from None

    def __reduce__(self) -> Any:
        return Wording, (self.template, self.key)  # Jinja's templates cannot be sent to a worker

    def fill(self, fields: Fields) -> str:
        """Return the text for one row. Raises: ValueError that names the column or says why the template fails."""
        if self.jinja is None:
            return COLUMN.sub(lambda match: self._value(fields, match.group(1)), self.template)
        there = {name: fields[name] for name in self.columns if name in fields}
        try:
            return self.jinja.render(there, row=fields)
        except UndefinedError as error:
            asked = re.search(r"^'(.+)' is undefined$|Row object' has no attribute '(.+)'$", str(error))
            absent = (asked.group(1) or asked.group(2)) if asked else None
            if absent is not None and absent not in fields:
                raise MissingColumn(fields.column(absent) if isinstance(fields, Row) else absent, fields) from None
            raise ValueError(f"{self.key}: {error}") from None
        except Exception as error:  # a template may raise anything
            raise ValueError(f"{self.key}: {type(error).__name__}: {error}") from None

    def _value(self, fields: Fields, name: str) -> str:
        try:
            return str(printed(field(fields, name)))
        except MissingColumn:
            raise
        except ValueError as error:
            raise ValueError(f"{self.key}: column {name!r} {error}") from None


def printed(value: Any) -> Any:
    """Return a value that a template may print. Raises: ValueError for one that would look like Python."""
    if value is None:
        raise ValueError("is null: write {{ column or '' }} to leave it out")
    if isinstance(value, dict | list | tuple):
        raise ValueError(f"holds {type(value).__name__}: write {{{{ column | tojson }}}}, or name one of its parts")
    return value
