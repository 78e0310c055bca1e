"""Sources of a mixture as people type them, and wordings with braces in them."""

import pytest

from sftlab.config.overrides import add_sources, quote


@pytest.mark.parametrize(
    ("typed", "made"),
    [
        (["data=mixture"], ["data=mixture"]),
        (["data=chat", "data.sources.a=chat"], ["data=chat", "data.sources.a=chat"]),
        (
            ["data=mixture", "data.sources.mine=chat", "data.sources.mine.path=f"],
            ["data=mixture", "+data@data.sources.mine=chat", "data.sources.mine.path=f",
             "~data@data.sources.gsm8k", "~data@data.sources.squad"],
        ),
        (
            ["data=mixture", "+data@data.sources.mine=text", "data.sources.squad.path=f"],
            ["data=mixture", "+data@data.sources.mine=text", "data.sources.squad.path=f", "~data@data.sources.gsm8k"],
        ),
        (
            ["data=mixture", "data.sources.mine=text", "data.weights={mine:1,gsm8k:2}"],
            ["data=mixture", "+data@data.sources.mine=text", "data.weights={mine:1,gsm8k:2}",
             "~data@data.sources.squad"],
        ),
        (["data=mixture", "data.sources.squad=demo"], ["data=mixture", "data@data.sources.squad=demo"]),
        (["data=mixture", "~data.sources.gsm8k"], ["data=mixture", "~data.sources.gsm8k"]),
        (
            ["data=mixture", "+data.sources.a={_target_: x}", "~data.sources.squad", "~data.sources.gsm8k"],
            ["data=mixture", "+data.sources.a={_target_: x}", "~data.sources.squad", "~data.sources.gsm8k"],
        ),
    ],
)  # fmt: skip
def test_a_source_is_added_by_its_name_and_replaces_those_listed(typed: list[str], made: list[str]) -> None:
    assert add_sources(typed) == made


def test_a_source_whose_rows_nobody_described_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data.sources.mine: say what its rows are with data.sources.mine=OPTION"):
        add_sources(["data=mixture", "data.sources.mine.path=f"])


@pytest.mark.parametrize(
    ("typed", "quoted"),
    [
        ("data.format.prompt=Q: {q}", "data.format.prompt='Q: {q}'"),
        ("data.format.completion={{ a }}, it's", "data.format.completion='{{ a }}, it\\'s'"),
        ("data.sources.x.format.system=[{q}", "data.sources.x.format.system=[{q}"),
        ("data.format.prompt={q}", "data.format.prompt='{q}'"),
        (
            "data.format.messages=[{% for t in x %}{% endfor %}]",
            "data.format.messages='[{% for t in x %}{% endfor %}]'",
        ),
        ("data.format.prompt=question", "data.format.prompt=question"),
        ("data.format.messages=[{role: user}]", "data.format.messages=[{role: user}]"),
        ("data.format.columns={a: b}", "data.format.columns={a: b}"),
        ("data.format.prompt='{q}'", "data.format.prompt='{q}'"),
        ("data.format.with_input={instruction}\n{input}", "data.format.with_input='{instruction}\n{input}'"),
    ],
)
def test_a_wording_with_braces_is_no_dict(typed: str, quoted: str) -> None:
    assert quote(typed, multirun=False) == quoted == quote(typed, multirun=True)
