"""docs/components.md: its files, written into an empty folder, train; and the site file of slurm_sites.md composes."""

import re
from pathlib import Path

import pytest
import yaml

import sftlab
from tests.support import REPO, read_jsonl

BLOCK = re.compile(r"^```\w+\n# (\S+/\S+\.(?:py|yaml))\n(.*?)^```", re.M | re.S)


def written(page: str, folder: Path) -> list[str]:
    """Write the files of a page into a folder; return their paths."""
    blocks = BLOCK.findall((REPO / "docs" / page).read_text(encoding="utf-8"))
    for name, body in blocks:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(body)
    return [name for name, _ in blocks]


def test_the_components_of_the_page_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = written("components.md", tmp_path)
    assert len(names) == 7 and {Path(name).parts[0] for name in names} == {"parts", "conf"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (command,) = re.findall(r"^python -m sftlab.train (.*)$", (REPO / "docs/components.md").read_text(), re.M)
    typed = [word for word in command.split() if "=" in word]
    config = sftlab.compose(
        *typed, "trainer.max_steps=2", "evaluation.num_answers=0", "data.limit=40", config_dir="conf"
    )
    sftlab.run(config)
    written_names = {key for line in read_jsonl(tmp_path / "out" / "metrics.jsonl") for key in line}
    told = set(re.findall(r"`((?:train|val|perf|mem|time)/\w+|step|time_s)`", (REPO / "docs/reading.md").read_text()))
    assert written_names <= told and len(written_names) > 15  # docs/reading.md says what each number is
    lines = [line for line in read_jsonl(tmp_path / "out" / "metrics.jsonl") if "train/loss" in line]
    rates = [line["train/lr"] for line in lines]
    assert rates == pytest.approx([5e-4, 5e-4 / 2**0.5])
    losses = (tmp_path / "out" / "losses.txt").read_text().splitlines()
    assert f"1 train/loss {lines[0]['train/loss']:.4f}" in losses and losses[-1].startswith("2 val/loss")
    with pytest.raises(ValueError, match=r"optim\.momentum=2: expected a number from 0 to 1"):
        sftlab.compose(*typed, "optim.momentum=2", config_dir="conf")


def test_the_file_of_a_site_composes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (name,) = written("slurm_sites.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    launcher = sftlab.compose(f"launcher={Path(name).stem}", config_dir="conf")["launcher"]
    own = yaml.safe_load((tmp_path / name).read_text())
    assert {key: launcher[key] for key in own if key != "defaults"} == {k: v for k, v in own.items() if k != "defaults"}
    assert launcher["_target_"] == "sftlab.launchers.slurm.Slurm"
