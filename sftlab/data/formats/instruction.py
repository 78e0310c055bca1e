"""Instructions in Alpaca's columns: an instruction, an optional input, and the response, which is learned.

Source: the two prompts of Stanford Alpaca, https://github.com/tatsu-lab/stanford_alpaca (train.py, PROMPT_DICT).
"""

from dataclasses import dataclass
from functools import cached_property

from sftlab.data.format import Columns, Fields, Format, Text, id_field, learned_field
from sftlab.data.wording import Wording

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
    """Column names, and the prompt's wording with and without an input. A row without the input column has no input.

    The wordings name `{instruction}` and `{input}`, whatever the columns are called.
    """

    instruction: str = "instruction"
    input: str | None = "input"
    output: str = "output"
    with_input: str = WITH_INPUT
    without_input: str = WITHOUT_INPUT
    columns: Columns | None = None

    def __post_init__(self) -> None:
        for name, needed in (("with_input", {"instruction", "input"}), ("without_input", {"instruction"})):
            used = set(self.words[name].columns)
            if used != needed:
                said = " and ".join(f"{{{column}}}" for column in sorted(needed, reverse=True))
                raise ValueError(
                    f"data.format.{name} must name {said} and no other; it names {', '.join(sorted(used)) or 'none'}"
                )
        if self.input is None and self.with_input != WITH_INPUT:
            raise ValueError("data.format.with_input has no effect: data.format.input=null says that there is no input")

    @cached_property
    def words(self) -> dict[str, Wording]:
        """The two wordings."""
        return {name: Wording(getattr(self, name), f"data.format.{name}") for name in ("with_input", "without_input")}

    def to_text(self, fields: Fields) -> Text:
        """Return the prompt and the response."""
        instruction, output = learned_field(fields, self.instruction), learned_field(fields, self.output)
        given = fields.get(self.input) if self.input else None
        if given is not None and not isinstance(given, str):
            raise ValueError(f"field {self.input!r} holds {type(given).__name__}, expected text")
        wording = self.words["with_input" if given and given.strip() else "without_input"]
        return Text(
            wording.fill({"instruction": instruction, "input": given}),
            output,
            id=id_field(fields),
            group=f"{bool(given)} {instruction}",
            references=(output.strip(),),
        )
