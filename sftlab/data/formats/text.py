"""Plain text, one column: language modelling, every token learned."""

from dataclasses import dataclass

from sftlab.common.values import Count
from sftlab.data.format import Columns, Fields, Format, Text, id_field, learned_field
from sftlab.data.formats.prompt_completion import GROUP_CHARS


@dataclass(frozen=True)
class PlainText(Format):
    """The column `column`; texts with the same first `group_chars` characters are in one prefix group."""

    column: str = "text"
    group_chars: Count = GROUP_CHARS
    columns: Columns | None = None

    def to_text(self, fields: Fields) -> Text:
        """Return the text, all of it to be learned."""
        text = learned_field(fields, self.column)
        return Text("", text, id=id_field(fields), group=text[: self.group_chars])
