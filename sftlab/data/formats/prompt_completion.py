"""Prompt and completion: two columns, joined unchanged. The completion is learned."""

from dataclasses import dataclass

from sftlab.common.values import Count
from sftlab.data.format import Columns, Fields, Format, Text, id_field, learned_field, text_field

GROUP_CHARS = 256  # prompts that share this many first characters are worth computing together


@dataclass(frozen=True)
class PromptCompletion(Format):
    """Nothing is put between the two, so a completion that should begin with a space must have it in the data.

    Prompts with the same first `group_chars` characters are in one prefix group.
    """

    prompt: str = "prompt"
    completion: str = "completion"
    group_chars: Count = GROUP_CHARS
    columns: Columns | None = None

    def to_text(self, fields: Fields) -> Text:
        """Return the two columns."""
        prompt, completion = text_field(fields, self.prompt), learned_field(fields, self.completion)
        return Text(
            prompt, completion, id=id_field(fields), group=prompt[: self.group_chars], references=(completion.strip(),)
        )
