"""Names of earlier versions: a person is told the new one, and what a run left behind is read as if it were new."""

from pathlib import Path

import pytest
import yaml
from hydra.utils import get_object

from sftlab.common.renamed import KEYS, MOVED, in_todays_names
from sftlab.common.run_directory import RunDirError, read_config
from sftlab.config.binding import check, check_node
from sftlab.config.unknown import unknown_key
from tests.runs import Trouble, compose, measured, run_here

Files = tuple[Path, Path]


@pytest.mark.parametrize("old", MOVED)
def test_a_target_that_moved_is_refused_with_its_new_place(old: str) -> None:
    assert callable(get_object(MOVED[old]))
    with pytest.raises(ValueError, match=rf"^schedule\._target_={old}: it has moved to {MOVED[old]}$"):
        check_node("schedule", {"_target_": old, "_partial_": True})


@pytest.mark.parametrize("old", KEYS)
def test_a_key_that_was_renamed_is_refused_with_its_new_name(old: str) -> None:
    assert unknown_key(old, ["seed", KEYS[old]]) == f"{old}: it is now called {KEYS[old]}"


def test_only_what_was_renamed_is_read_in_todays_names() -> None:
    old = {"evaluation": {"answers": 3}, "answers": 4, "trainer": {"answers": [{"_target_": "sftlab.optim.adamw"}]}}
    assert in_todays_names(old) == {
        "evaluation": {"num_answers": 3},
        "answers": 4,
        "trainer": {"answers": [{"_target_": "sftlab.training.optim.adamw"}]},
    }


def test_a_split_that_counted_only_where_there_was_one_says_so_now() -> None:
    data = {"_target_": "sftlab.data.dataset.Data", "path": "x.jsonl", "val_split": "validation", "subset": None}
    assert in_todays_names({"data": data})["data"] == {**data, "val_split": "validation?"}
    sources = {"a": {**data, "subset": "main"}, "b": {**data, "unknown": "error"}}
    read = in_todays_names({"data": {"sources": sources}})["data"]["sources"]
    assert (read["a"]["subset"], read["a"]["val_split"]) == ("main?", "validation?") and read["b"] == sources["b"]


def in_yesterdays_names(folder: Path) -> None:
    """Rewrite a run's config with every name that an earlier version had for it."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    before = {new: old for old, new in MOVED.items()}
    config["tracker"] = {"_target_": "sftlab.common.trackers.no_trackers", "_partial_": True}
    for node in ("optim", "schedule", "parallel", "trainer", "evaluation"):
        config[node]["_target_"] = before[config[node]["_target_"]]
    config["evaluation"]["answers"] = config["evaluation"].pop("num_answers")
    config["resume_anyway"] = config.pop("resume_despite_changes")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def test_a_run_of_an_earlier_version_resumes(tmp_path: Path, model_folder: Path, squad_files: Files) -> None:
    """Stopped at step 3 of 4, its config is rewritten as the earlier version had it; another seed is still refused."""
    steps = ("trainer.max_steps=4", "trainer.save_every=1", "trainer.batch_size=6")
    config = compose(tmp_path / "run", model_folder, squad_files, *steps)
    assert run_here(config, Trouble(crash_at=3)) == "Crash: "
    in_yesterdays_names(tmp_path / "run")
    old = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert old["schedule"]["_target_"].startswith("sftlab.schedule.") and "num_answers" not in old["evaluation"]
    read = read_config(tmp_path / "run")
    assert read == config
    check({k: v for k, v in read.items()})

    other = run_here({**config, "seed": 1})
    assert other.startswith(RunDirError.__name__) and "seed" in other and "evaluation" not in other
    assert "_target_" not in other and yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) == old
    assert run_here(config).startswith("score ")
    assert sorted(step for step, name in measured(tmp_path / "run") if name == "train/loss") == [1, 2, 3, 4]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) == config
