"""`sftlab convert`: configs in the manner of two other trainers become experiments, and nothing is lost."""

from pathlib import Path

import pytest
import yaml

from sftlab.config.composing import composed
from tests.commands import Typed

AXOLOTL = """
base_model: somebody/model
datasets:
  - path: somebody/rows
    type: alpaca
    split: train[:10%]
val_set_size: 100
sequence_len: 1024
sample_packing: true
micro_batch_size: 2
gradient_accumulation_steps: 3
num_epochs: 2
optimizer: adamw_torch
lr_scheduler: cosine
learning_rate: 2e-5
warmup_steps: 7
bf16: auto
gradient_checkpointing: true
output_dir: ./outputs
wandb_project:
plugins: [axolotl.integrations.liger.LigerPlugin]
special_tokens: {pad_token: "<|pad|>"}
"""
AUTOMODEL = """
step_scheduler: {global_batch_size: 64, local_batch_size: 8, val_every_steps: 10, max_steps: 500}
rng: {_target_: nemo_automodel.components.training.rng.StatefulRNG, seed: 42, ranked: true}
model: {_target_: nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path: some/model}
dataset: {_target_: nemo_automodel.x.make_squad_dataset, dataset_name: some/squad, split: train}
validation_dataset: {_target_: x.make_squad_dataset, dataset_name: some/squad, split: validation}
optimizer: {_target_: torch.optim.AdamW, lr: 1.0e-5, betas: [0.9, 0.95], weight_decay: 0.1}
lr_scheduler: {lr_decay_style: cosine, min_lr: 1.0e-6}
distributed: {strategy: fsdp2, tp_size: 1}
"""


def converted(typed: Typed, folder: Path, text: str, *words: str) -> tuple[str, dict]:
    """Return what the command prints for a config, and the config that its experiment composes."""
    file = folder / "theirs.yml"
    file.write_text(text)
    out = folder / "mine" / "experiment" / "ours.yaml"
    said = typed("convert", f"file={file}", f"output={out}", *words)
    return said, composed(["experiment=ours"], folder / "mine")


def test_a_config_of_axolotl(typed: Typed, tmp_path: Path) -> None:
    said, config = converted(typed, tmp_path, AXOLOTL)
    data, trainer = config["data"], config["trainer"]
    assert (data["path"], data["split"], data["val_examples"]) == ("somebody/rows", "train[:10%]", 100)
    assert data["format"]["_target_"].endswith("Instruction")
    assert (data["max_length"], data["overlong"], data["layout"]) == (1024, "truncate", "tree")
    assert (trainer["batch_size"], trainer["epochs"], trainer["activation_checkpointing"]) == (6, 2, "full")
    assert (config["optim"]["lr"], config["schedule"]["warmup_steps"]) == (2e-5, 7)
    assert config["model"]["name_or_path"] == "somebody/model" and config["run_dir"] == "./outputs"
    left = said.partition("without a counterpart:\n")[2].partition("look at")[0]
    assert [line.strip() for line in left.splitlines()] == [
        "plugins=[axolotl.integrations.liger.LigerPlugin]",
        "special_tokens.pad_token=<|pad|>",
    ]
    assert "wandb" not in said and "to mend" not in said


def test_a_config_of_automodel(typed: Typed, tmp_path: Path) -> None:
    said, config = converted(typed, tmp_path, AUTOMODEL)
    assert (config["trainer"]["batch_size"], config["trainer"]["max_steps"], config["trainer"]["eval_every"]) == (
        64,
        500,
        10,
    )
    assert (config["data"]["path"], config["data"]["val_split"], config["seed"]) == ("some/squad", "validation", 42)
    assert (config["optim"]["betas"], config["optim"]["weight_decay"]) == ([0.9, 0.95], 0.1)
    assert config["schedule"]["_target_"].endswith("cosine") and config["schedule"]["final_ratio"] == 0.1
    assert "distributed.tp_size=1" in said and "rng.ranked=true" in said
    constant = AUTOMODEL.replace("lr_scheduler: {lr_decay_style: cosine, min_lr: 1.0e-6}\n", "")
    _, config = converted(typed, tmp_path, constant, "overwrite=true")
    assert config["schedule"]["_target_"].endswith("constant"), "AutoModel keeps the rate where no scheduler is named"


def test_columns_that_are_mapped_become_a_wording(typed: Typed, tmp_path: Path) -> None:
    mapped = (
        "{_target_: x.ColumnMappedTextInstructionDataset, path_or_dataset_id: a/b, "
        "column_mapping: {context: c, question: q, answer: a}}"
    )
    text = "\n".join(f"dataset: {mapped}" if line.startswith("dataset:") else line for line in AUTOMODEL.splitlines())
    _, config = converted(typed, tmp_path, text)
    assert (config["data"]["format"]["prompt"], config["data"]["format"]["completion"]) == ("{c} {q}", " {a}")
    assert config["data"]["path"] == "a/b"


def test_several_datasets_are_a_mixture_on_the_command_line(typed: Typed, tmp_path: Path) -> None:
    two = "datasets:\n  - {path: a/b, type: alpaca}\n  - {path: c/d, type: chat_template, split: test}\n"
    said, _ = converted(typed, tmp_path, "base_model: m/n\n" + two)
    words = said.splitlines()[-1].partition("experiment=ours ")[2].split()
    config = composed(["experiment=ours", *words], tmp_path / "mine")
    sources = config["data"]["sources"]
    assert {name: (s["path"], s["split"]) for name, s in sources.items()} == {
        "s1": ("a/b", "train"),
        "s2": ("c/d", "test"),
    }


def test_rows_that_nobody_describes_are_said(typed: Typed, tmp_path: Path) -> None:
    said, _ = converted(typed, tmp_path, "base_model: m/n\ndatasets: [{path: a/b, type: my_own}]\n")
    assert "datasets.type=my_own: say what a row of a/b is, data=OPTION" in said


@pytest.mark.parametrize(
    ("text", "message"), [("a: 1\n", "neither a config of axolotl"), ("- a\n", "it holds no keys")]
)
def test_another_file_is_refused(text: str, message: str, refused: Typed, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text(text)
    assert message in refused("convert", str(tmp_path / "other.yaml"))


def test_a_file_is_never_replaced_unasked(typed: Typed, refused: Typed, tmp_path: Path) -> None:
    converted(typed, tmp_path, AXOLOTL)
    out = f"output={tmp_path / 'mine/experiment/ours.yaml'}"
    assert "overwrite=true" in refused("convert", str(tmp_path / "theirs.yml"), out)
    assert "expected a file FOLDER/experiment/NAME.yaml" in refused(
        "convert", str(tmp_path / "theirs.yml"), "output=a.yaml"
    )
    assert yaml.safe_load((tmp_path / "mine/experiment/ours.yaml").read_text())["data"]["path"] == "somebody/rows"
