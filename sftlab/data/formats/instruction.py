"""Instructions in Alpaca's columns: an instruction, an optional input, and the response, which is learned.

Source: the two prompts of Stanford Alpaca, https://github.com/tatsu-lab/stanford_alpaca (train.py, PROMPT_DICT).
"""

from dataclasses import dataclass

from sftlab.data.format import Fields, Format, Text, id_field, learned_field

INTRODUCTION = "Below is an instruction that describes a task"
WITH_INPUT = (
    f"{INTRODUCTION}, paired with an input that provides further context. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    f"{INTRODUCTION}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Instruction(Format):
    """Column names, and the prompt's wording with and without an input. A row without the input column has no input."""

    instruction: str = "instruction"
    input: str | None = "input"
    output: str = "output"
    with_input: str = WITH_INPUT
    without_input: str = WITHOUT_INPUT

    def to_text(self, fields: Fields) -> Text:
        """Return the prompt and the response."""
        instruction, output = learned_field(fields, self.instruction), learned_field(fields, self.output)
        given = fields.get(self.input) if self.input else None
        if given is not None and not isinstance(given, str):
            raise ValueError(f"field {self.input!r} holds {type(given).__name__}, expected text")
        wording = self.with_input if given and given.strip() else self.without_input
        return Text(
            wording.format(instruction=instruction, input=given),
            output,
            id=id_field(fields),
            group=f"{bool(given)} {instruction}",
            references=(output.strip(),),
        )
