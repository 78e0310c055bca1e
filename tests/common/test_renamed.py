"""A run of an earlier version is read in today's names, all of which exist."""

from importlib import import_module
from pathlib import Path

import pytest
import yaml

from sftlab.common.renamed import MOVED, in_todays_names
from sftlab.common.run_directory import read_config


@pytest.mark.parametrize("target", sorted(set(MOVED.values())))
def test_what_was_moved_is_where_it_is_said_to_be(target: str) -> None:
    module, _, name = target.rpartition(".")
    assert callable(getattr(import_module(module), name))


def test_a_config_of_an_earlier_version_is_read_in_todays_names(tmp_path: Path) -> None:
    old = {
        "resume_anyway": True,
        "evaluation": {"_target_": "sftlab.settings.EvaluationSettings", "answers": 7, "max_new_tokens": 3},
        "sweeper": {"n_trials": 5},
        "data": {"answers": 1, "sources": [{"_target_": "some.own.Data", "n_trials": 2}]},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old, sort_keys=False))
    new = read_config(tmp_path)
    assert new == {
        "resume_despite_changes": True,
        "evaluation": {
            "_target_": "sftlab.training.settings.EvaluationSettings", "num_answers": 7, "max_new_tokens": 3
        },
        "sweeper": {"num_trials": 5},
        "data": {"answers": 1, "sources": [{"_target_": "some.own.Data", "n_trials": 2}]},
    }  # fmt: skip
    assert list(new) == ["resume_despite_changes", *list(old)[1:]] and in_todays_names(new) == new
