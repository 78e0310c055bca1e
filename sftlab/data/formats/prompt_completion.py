"""Prompt and completion: two columns, joined unchanged. The completion is learned."""

from dataclasses import dataclass

from sftlab.data.format import Fields, Format, Text, id_field, learned_field, text_field

GROUP_CHARS = 256  # prompts that share this many first characters are worth computing together


@dataclass(frozen=True)
class PromptCompletion(Format):
    """Nothing is put between the two, so a completion that should begin with a space must have it in the data.

    Prompts with the same first `group_chars` characters are in one prefix group.
    """

    prompt: str = "prompt"
    completion: str = "completion"
    group_chars: int = GROUP_CHARS

    def to_text(self, fields: Fields) -> Text:
        """Return the two columns."""
        prompt, completion = text_field(fields, self.prompt), learned_field(fields, self.completion)
        return Text(
            prompt, completion, id=id_field(fields), group=prompt[: self.group_chars], references=(completion.strip(),)
        )
