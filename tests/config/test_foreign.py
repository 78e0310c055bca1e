"""Words of other trainers: what each is here, that what is named exists, and that the docs show the same table."""

import re
from collections.abc import Mapping
from typing import Any

import pytest
import yaml

from sftlab.config import foreign
from sftlab.config.binding import RunKeys
from sftlab.config.composing import composed
from sftlab.config.groups import CONF, flat, keys_of_option, options
from tests.support import REPO

SAMPLES: dict[str, Any] = {"batch": 4, "epochs": 2, "max_steps": 5, "warmup_ratio": 0.1, "min_lr": 1e-6}
SAMPLES |= {
    "optimizer": "adamw_torch",
    "betas": 0.9,
    "chat_template": "mine.jinja",
    "val_set_size": 9,
    "targets": ["q"],
}


def overrides() -> dict[str, str]:
    """Return every override that the table can answer with, and the key that it answers."""
    found = {}
    for row in foreign.table():
        key = row["keys"][0]
        if "compute" in row:
            answer = foreign.answer(
                key, SAMPLES[row["compute"]], {key: SAMPLES[row["compute"]], "max_steps": 10, "lr": 1}
            )
            assert answer is not None and answer.settings, key
            found |= dict.fromkeys(answer.settings, key)
        else:
            texts = row["here"].values() if isinstance(row["here"], Mapping) else [row["here"]]
            found |= {word: key for text in texts for word in (text or "").split()}
    return found


def test_every_target_is_a_key_or_an_option_that_exists() -> None:
    known = set(flat(composed([]))) | set(RunKeys.__dataclass_fields__)
    groups = {folder.name for folder in CONF.iterdir() if folder.is_dir()}
    known |= {f"{g}.{k}" for g in groups for o in options(g) for k in keys_of_option(g, o)}
    for word, key in overrides().items():
        name, _, value = word.partition("=")
        assert value in options(name) if name in groups else name in known, f"{key}: {word}"


def test_the_table_knows_sixty_keys_of_five_trainers_and_each_once() -> None:
    keys = [key for row in foreign.table() for key in row["keys"]]
    assert len(keys) == len(set(keys)) > 60
    assert {"TRL", "transformers", "axolotl", "AutoModel", "torchtune"} <= {
        word for row in foreign.table() for word in row["of"].split()
    }
    for row in foreign.table():
        assert ("compute" in row) != ("here" in row) and (row.get("here") or "compute" in row or row.get("note"))


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        ({"learning_rate": 2e-5}, ["optim.lr=2e-05"]),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8}, ["trainer.batch_size=32"]),
        ({"micro_batch_size": 2}, ["trainer.batch_size=2"]),
        ({"gradient_accumulation_steps": 8}, ["trainer.batch_size=8"]),
        ({"step_scheduler.local_batch_size": 8, "step_scheduler.global_batch_size": 64}, ["trainer.batch_size=64"]),
        ({"num_train_epochs": 3.0}, ["trainer.epochs=3"]),
        ({"num_train_epochs": 0.5}, []),
        ({"max_steps": -1}, ["trainer.max_steps=null"]),
        ({"warmup_ratio": 0.03, "max_steps": 1000}, ["schedule.warmup_steps=30", "trainer.max_steps=1000"]),
        ({"warmup_ratio": 0.03}, []),
        ({"lr": 1e-5, "min_lr": 1e-6}, ["optim.lr=1e-05", "schedule.final_ratio=0.1"]),
        ({"adam_beta2": 0.95}, ["optim.betas=[0.9,0.95]"]),
        ({"lr_scheduler_type": "warmup_stable_decay"}, ["schedule=wsd"]),
        ({"bf16": True}, ["parallel.param_dtype=bfloat16"]),
        ({"bf16": "auto"}, ["parallel.param_dtype=auto"]),
        ({"max_seq_length": 2048}, ["data.max_length=2048", "data.overlong=truncate"]),
        ({"packing": True}, ["data.layout=tree"]),
        ({"packing": False}, ["data.layout=padded"]),
        ({"gradient_checkpointing": True}, ["trainer.activation_checkpointing=full"]),
        ({"max_grad_norm": 0}, ["trainer.clip_grad_norm=null"]),
        ({"max_grad_norm": 0.5}, ["trainer.clip_grad_norm=0.5"]),
        ({"val_set_size": 200}, ["data.val_examples=200"]),
        ({"val_set_size": 0.1}, []),
        ({"optim": "adamw_torch_fused"}, ["optim=adamw"]),
        ({"resume_from_checkpoint": True}, ["resume=auto"]),
        ({"save_total_limit": 3}, ["trainer.keep_checkpoints=3"]),
        ({"deepspeed": "zero3.json"}, ["parallel=fsdp2"]),
    ],
)
def test_what_a_key_and_its_value_are_here(given: dict[str, Any], settings: list[str]) -> None:
    found = [foreign.answer(key, value, given) for key, value in given.items()]
    assert list(dict.fromkeys(word for answer in found if answer for word in answer.settings)) == settings
    assert all(answer.settings or answer.note for answer in found if answer)
    assert len(foreign.lines(given)) == len(set(found))


def test_a_key_of_nobody_has_no_answer() -> None:
    assert foreign.answer("colour", 1, {"colour": 1}) is None and foreign.lines({"colour": 1}) == []
    assert foreign.name_of("optim.learning_rate", {"optim"}) == "learning_rate"
    assert foreign.name_of("nothing.learning_rate", {"optim"}) == "nothing.learning_rate"


def test_the_docs_show_the_table() -> None:
    page = (REPO / "docs" / "migrating.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- table: foreign -->\n(.*?)\n<!-- end -->", page, re.DOTALL)
    assert table is not None and table[1] == foreign.as_markdown(), "python -m sftlab.config.foreign prints it"


def test_the_table_is_one_yaml() -> None:
    assert yaml.safe_load((REPO / "sftlab/config/foreign.yaml").read_text()) == list(foreign.table())
