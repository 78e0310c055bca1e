"""The recipes in conf/experiment/ and docs/recipes.md: each composes and trains two steps of a tiny model."""

import json
import re
from pathlib import Path

import pytest
import yaml

import sftlab
from sftlab.config.binding import check
from sftlab.config.groups import CONF
from tests.commands import Typed
from tests.data.test_turns import ASK, QWEN3
from tests.support import REPO, read_jsonl

PAGE = (REPO / "docs" / "recipes.md").read_text(encoding="utf-8")
RECIPES = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
ROWS = dict(re.findall(r"```jsonl (\w+)\n((?:.*\n)+?)```", PAGE))
# As Qwen 3's: it writes the tools, drops earlier thoughts, and puts an empty one into a prompt without thinking.
TOOLS = "{%- if tools %}{{- '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{%- endif %}"
EMPTY = "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
QWEN = TOOLS + QWEN3.replace(ASK, ASK.replace("{%- endif %}", EMPTY + "{%- endif %}"))
CHATS = [[{"role": "user", "content": f"Hello {i}."}, {"role": "assistant", "content": "Good day."}] for i in range(6)]
OTHER_ROWS = {
    "chat_qwen3": [{"messages": chat} for chat in CHATS],
    "lora_24gb": [{"instruction": f"Say {i} again.", "input": str(i), "output": str(i)} for i in range(6)],
    "continued_pretraining": [{"text": f"The mill has {i} wheels."} for i in range(6)],
}
TINY = ["trainer.max_steps=2", "trainer.batch_size=2", "evaluation.max_new_tokens=4", "tracker=none", "seed=1"]
TEMPLATE = ["data.format.template_path=template.jinja", "model.add_tokens=['<|im_start|>','<|im_end|>']"]
LESS = {  # what makes a recipe small, beside its model and its rows
    "chat_qwen3": ["data.subset=null", "data.val_split=null", "data.val_examples=2", *TEMPLATE],
    "lora_24gb": ["data.val_examples=2"],
    "tool_calling": ["data.val_examples=2", *TEMPLATE],
    "continued_pretraining": ["data.val_examples=2"],
    "lr_sweep_slurm": ["data.val_split=null", "data.val_examples=2"],
    "llama3_2_1b_squad": ["data.val_split=null", "data.val_examples=2", "parallel.param_dtype=float32"],
}


def test_the_page_has_every_recipe_and_its_command() -> None:
    assert set(re.findall(r"experiment=(\w+)", PAGE)) == set(RECIPES) == set(LESS)
    for name in RECIPES:
        said = (CONF / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
        (command,) = re.findall(rf"^(?:python|torchrun .*) -m sftlab.train experiment={name}\b.*$", PAGE, re.M)[:1]
        assert f"experiment={name}" in said.partition("defaults:")[0] and command


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_composes_and_is_checked(name: str) -> None:
    missing = "???" in (CONF / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
    if missing:
        with pytest.raises(ValueError, match=r"data\.path has no default: give one, data\.path=\.\.\."):
            sftlab.compose(f"experiment={name}")
    config = sftlab.compose(f"experiment={name}", *(["data.path=rows.jsonl"] if missing else []))
    own = yaml.safe_load((CONF / "experiment" / f"{name}.yaml").read_text(encoding="utf-8"))
    assert check(config)["trainer"].batch_size == own["trainer"]["batch_size"]
    assert config["name"] == own["name"] and config["model"]["init"] == "pretrained"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains(
    name: str, model_folder: Path, squad_files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "template.jinja").write_text(QWEN)
    path = squad_files[0]
    if name in ROWS or name in OTHER_ROWS:
        path = tmp_path / "rows.jsonl"
        path.write_text(ROWS.get(name) or "".join(json.dumps(row) + "\n" for row in OTHER_ROWS[name]))
    small = [f"data.path={path}", f"model.name_or_path={model_folder}", "run_dir=run", *LESS[name], *TINY]
    config = sftlab.compose(f"experiment={name}", *small, "data.max_length=1024", "data.row_length=1024")
    loss = sftlab.run(config)
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["step"] == 2 and loss == lines[-1]["val/loss"]
    if name == "tool_calling":
        assert {"val/tool_name", "val/tool_valid_json", "val/tool_arguments"} <= lines[-1].keys()


def test_the_sweep_has_its_points_and_a_site_takes_slurms_place(typed: Typed, tmp_path: Path) -> None:
    given = ["experiment=lr_sweep_slurm", "launcher.dry_run=true", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    said = typed("train", *given, "optim.lr=1e-5,3e-5", "launcher=slurm_a100")
    assert re.findall(r"^# point (\d+): optim\.lr=(\S+) seed=(\d)", said, re.M) == [
        (str(i), rate, str(seed))
        for i, (rate, seed) in enumerate((rate, seed) for rate in ("1e-05", "3e-05") for seed in range(3))
    ]
    assert "--constraint=a100" in said and "--gpus-per-node=8" in said
    own = yaml.safe_load((CONF / "experiment" / "lr_sweep_slurm.yaml").read_text(encoding="utf-8"))
    assert own["hydra"]["sweeper"]["params"] == {"optim.lr": "5e-6,1e-5,2e-5,4e-5", "seed": "0,1,2"}
