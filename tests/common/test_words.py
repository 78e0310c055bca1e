"""Numbers and texts as people read them, worked out by hand."""

import pytest

from sftlab.common.words import duration, end_of, one_line


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"), (1.6, "2 s"), (89.4, "89 s"), (90, "2 min"), (149, "2 min"), (151, "3 min"), (89.4 * 60, "89 min"),
        (90 * 60, "1 h 30 min"), (7200, "2 h 0 min"), (12_000, "3 h 20 min"), (86_400, "24 h 0 min"),
    ],
)  # fmt: skip
def test_durations_as_people_say_them(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_texts_are_cut_at_the_end_and_prompts_at_the_beginning() -> None:
    assert one_line(" a\n b ") == end_of(" a\n b ") == "a b"
    assert one_line("x" * 160) == "x" * 160 and one_line("x" * 161) == "x" * 157 + "..."
    assert one_line("abcdefgh", 6) == "abc..."
    assert end_of("x" * 480) == "x" * 480
    assert end_of("one two three four", 18) == "one two three four"
    assert end_of("one two three four", 17) == "... three four", "words whole"
    assert len(end_of("word " * 400)) <= 480
