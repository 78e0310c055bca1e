"""docs/architecture.md as it stands: its rooms are the folders, its paths exist, its worked example runs elsewhere."""

import json
import re
import subprocess
from pathlib import Path

from sftlab.__main__ import COMMANDS
from tests.support import REPO, read_jsonl, warmed

PAGE = (REPO / "docs" / "architecture.md").read_text(encoding="utf-8")
SETTINGS = ["trainer.max_steps=2", "evaluation.num_answers=2", "tracker=none"]


def entries(folder: Path) -> set[str]:
    """Return what git keeps in a folder, one level deep, the package's own dunder files left out."""
    name = folder.relative_to(REPO).as_posix()
    listed = subprocess.run(["git", "ls-files", name], cwd=REPO, capture_output=True, text=True, check=True).stdout
    found = {Path(line).relative_to(name).parts[0] for line in listed.splitlines()}
    return {entry for entry in found if not entry.startswith(("__", "."))}


def test_the_table_of_rooms_names_every_folder_and_every_command() -> None:
    table = PAGE[PAGE.index("| room |") : PAGE.index("`hydra_plugins/`")]
    there = entries(REPO / "sftlab")
    assert set(re.findall(r"^\| `(\w+)/` \|", table, re.MULTILINE)) == {e for e in there if not e.endswith(".py")}
    commands = table.splitlines()[2].split("`")[1].split()
    assert {f"{name}.py" for name in commands} == {e for e in there if e.endswith(".py")} and set(commands) == set(
        COMMANDS
    )


def test_the_readmes_tree_is_complete() -> None:
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    tree = readme[readme.index("## The tree") : readme.index("## After training")]
    blocks = re.split(r"^(\w+)/\s", tree, flags=re.MULTILINE)
    found = dict(zip(blocks[1::2], blocks[2::2], strict=True))
    assert set(found) == {e for e in entries(REPO) if (REPO / e).is_dir()}
    for folder in ("conf", "sftlab"):
        named = set(re.findall(r"^  (\w+)/", found[folder], re.MULTILINE))
        named |= set(re.findall(r"\b\w+\.(?:py|yaml)\b", found[folder]))
        assert named == entries(REPO / folder)


def test_every_path_on_the_page_exists() -> None:
    paths = [p for p in re.findall(r"`([\w/]+/[\w/.]+)`", PAGE) if "NAME" not in p and "riddles" not in p]
    assert len(paths) > 20
    assert [p for p in paths if not (REPO / p).exists() and not (REPO / "sftlab" / p).exists()] == []


def block(kind: str) -> str:
    """Return the code block of this kind in the worked example."""
    found = re.search(rf"```{kind}\n(.*?)```", PAGE[PAGE.index("## A format") :], re.DOTALL)
    assert found is not None
    return found[1]


def test_the_worked_example_runs_in_a_folder_outside_the_project(tmp_path: Path) -> None:
    assert len((block("python") + block("yaml")).splitlines()) < 40
    (tmp_path / "riddles.py").write_text(block("python"))
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "riddles.yaml").write_text(block("yaml"))
    rows = [{"riddle": f"I have {n} legs.", "solution": f"a table with {n} legs"} for n in range(20)]
    (tmp_path / "riddles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    commands = re.findall(r"^python -m (sftlab\.\w+) (.*)$", block("bash"), re.MULTILINE)
    assert [module for module, _ in commands] == ["sftlab.preview", "sftlab.train", "sftlab.evaluate"]
    for module, arguments in commands:
        typed = [*arguments.split(), *(SETTINGS if module == "sftlab.train" else [])]
        done = subprocess.run(
            [str(warmed().python), "-m", module, *typed], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "out/evaluate/riddles/scores.json").read_text())
    assert scores["examples"] == 4 and set(scores["scores"]) >= {"loss", "exact_match"}
    first = read_jsonl(tmp_path / "out/evaluate/riddles/predictions.jsonl")[0]
    assert first["prompt"].endswith("What am I?") and first["references"][0].startswith("a table with")
