"""Pages that name things of the code: every metric, plot, tracker and setting on them is there, and none is missing."""

import re

import yaml

from sftlab.config.groups import CONF
from tests.support import REPO

DOCS = REPO / "docs"


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


RARE = {  # parts that are there at times, and say themselves what they are
    "Why it ended", "Differences from the defaults", "Profile", "Answers of the best point", "All points",
    "Run the winner again",
}  # fmt: skip


def test_reading_names_every_part_of_the_reports() -> None:
    of_run, of_sweep = page("reading.md").split("## report.html of a ")[1:]
    for told, file in ((of_run, "reports/run.html"), (of_sweep, "sweeps/report/sweep.html")):
        headings = re.findall(r"<h2>(.*?)</h2>", (REPO / "sftlab" / file).read_text(encoding="utf-8"))
        assert set(headings) - RARE <= set(re.findall(r"^\| ([^|]+?) \|", told, re.M)), file


def test_trackers_has_every_option_and_setting() -> None:
    told = page("trackers.md")
    for file in (CONF / "tracker").glob("*.yaml"):
        assert f"tracker={file.stem}`" in told
        for name, node in (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).items():
            keys = {key for key in node if not key.startswith("_")}
            assert {
                k for k in keys if f"`tracker.<name>.{k}`" not in told and f"`tracker.{name}.{k}`" not in told
            } == set()


def test_what_pages_call_a_setting_is_one() -> None:
    """`group.key` in backticks: of train.yaml, or of an option of the group."""
    known = "\n".join(path.read_text(encoding="utf-8") for path in CONF.rglob("*.yaml"))
    wrong = []
    for path in DOCS.glob("*.md"):
        if path.name == "migrating.md":  # it names the keys of others
            continue
        named = re.findall(
            r"`(?:trainer|evaluation|data|model|schedule|optim|launcher|peft|parallel)\.([\w.]+)", path.read_text()
        )
        wrong += [f"{path.name}: {key}" for key in named if not re.search(rf"\b{key.split('.')[-1]}:", known)]
    assert [w for w in wrong if not re.search(r"\.(?:py|yaml|KEY)$|mine|more", w)] == []
