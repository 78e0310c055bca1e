"""python -m sftlab.publish against a hub on loopback: what is written, refused, uploaded and left by failures."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard, constants

from sftlab.assets import FOLDER as ASSETS
from sftlab.publishing.paths import relative
from sftlab.publishing.plot import log_ticks, loss_plot, ticks
from sftlab.publishing.refuse import refuse
from sftlab.publishing.upload import upload
from tests.commands import Typed
from tests.local_hub import TOKEN, LocalHub, Repo

# huggingface_hub's own way of uploading a file by LFS warns in httpx.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

# NeMo AutoModel's guide, as it stands but for the model's name.
GUIDE = """
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name!r})
model = AutoModelForCausalLM.from_pretrained({name!r})
prompt = "Context: Sandwell is a port. Question: What is Sandwell? Answer:"
inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
outputs = model.generate(**inputs, max_length=100)
print(tokenizer.decode(outputs[0], skip_special_tokens=True))
"""


@pytest.fixture
def run(demo_run: Path, tmp_path: Path) -> Path:
    """A copy of the demo's run, to be published or broken."""
    folder = tmp_path / "run, 1"
    shutil.copytree(demo_run, folder, symlinks=True, ignore=shutil.ignore_patterns("evaluate"))
    return folder


def python(code: str, hub: LocalHub, cache: Path) -> str:
    """Run a program against the hub, in a process and with a cache of its own."""
    environment = {**os.environ, **hub.env, "HF_HOME": str(cache)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def snippet(card: str) -> str:
    """Return the card's first program, that for transformers."""
    return card.split("```python\n")[1].split("```")[0]


def test_dry_run_writes_the_folder_and_asks_nobody(run: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    out = typed("publish", f"run={run}", "repo_id=ada/demo", "dry_run=true")
    names = {p.name for p in (run / "publish").iterdir()}
    assert names == {p.name for p in (run / "model").iterdir()} | {"README.md", "loss.svg", "sftlab_config.yaml"}
    assert all(name in out for name in names) and "nothing was uploaded" in out
    for file in (run / "model").iterdir():
        assert (run / "publish" / file.name).read_bytes() == file.read_bytes()


def test_card_tells_of_the_run(run: Path, typed: Typed) -> None:
    scores = {
        "data": "demo",
        "examples": 250,
        "scores": {"loss": 2.0, "f1": 0.25},
        "baseline": {"loss": 8.0, "f1": 0.125},
        "difference": {"f1": {"value": 0.125, "low": 0.05, "high": 0.2}},
    }
    (run / "evaluate" / "demo").mkdir(parents=True)
    (run / "evaluate" / "demo" / "scores.json").write_text(json.dumps(scores))
    typed("publish", f"run={run}", "repo_id=ada/demo", "dry_run=true")
    card = ModelCard.load(run / "publish" / "README.md")
    data = card.data.to_dict()
    assert (data["license"], data["library_name"], data["pipeline_tag"]) == (
        "apache-2.0",
        "transformers",
        "text-generation",
    )
    assert "base_model" not in data  # the demo's is no repository on the hub
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == {"loss": 2.0, "f1": 0.25}
    text = card.content
    environment = json.loads((run / "environment.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    assert "| f1 | 0.1250 | **0.2500** | +0.1250 | +0.0500 to +0.2000 |" in text
    assert f"| loss | {first_loss(run):.4f} | **{summary['last']['val/loss']:.4f}** |" in text
    assert "| steps | 40 |" in text and "adamw: lr 0.001" in text and "cosine: warmup_steps 0" in text
    assert f"`{environment['git_commit']}`" in text and "![Loss by optimiser step](loss.svg)" in text
    original = "run_dir=../../demo0/run, [of] 'today'=1"  # the run that this is a copy of
    command = (
        f"python -m sftlab.train {shlex.quote(original)} trainer.max_steps=40 evaluation.num_answers=8 tracker=none"
    )
    assert command in re.sub(r"demo\d+/", "demo0/", text)
    assert "**Validation during training, answers scored on a sample of 8**" in text
    assert "vllm serve ada/demo" in text
    first = json.loads((ASSETS / "demo" / "validation.jsonl").read_text().splitlines()[0])
    assert asked(text) == f"Context: {first['context']} Question: {first['question']} Answer:"
    config = yaml.safe_load((run / "publish" / "sftlab_config.yaml").read_text())
    assert config["trainer"]["max_steps"] == 40 and not config["run_dir"].startswith("/")


def first_loss(run: Path) -> float:
    return float(json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["val/loss"])


def test_base_model_datasets_and_licence_come_from_the_hub(run: Path, typed: Typed, hub: LocalHub) -> None:
    card = b"---\nlicense: other\nlicense_name: lamp\nlicense_link: LICENSE\n---\n# A base\n"
    hub.repos["ada/base"] = Repo(private=False, commits=[{"README.md": card}])
    set_config(run, model={"name_or_path": "ada/base"}, data={"path": "ada/questions"})
    typed("publish", f"run={run}", "repo_id=ada/tuned")
    data = ModelCard(hub.repos["ada/tuned"].files["README.md"].decode()).data
    assert (data.base_model, data.datasets) == ("ada/base", ["ada/questions"])
    assert (data.license, data.license_name, data.license_link) == ("other", "lamp", "LICENSE")


def test_unknown_licence_is_said_never_guessed(run: Path, typed: Typed) -> None:
    set_config(run, model={"name_or_path": "ada/base"})
    out = typed("publish", f"run={run}", "repo_id=ada/tuned", "dry_run=true")
    card = ModelCard.load(run / "publish" / "README.md")
    assert "license" not in card.data.to_dict() and "Not known" in card.text and "license= states one" in out
    typed("publish", f"run={run}", "repo_id=ada/tuned", "dry_run=true", "license=mit")
    assert ModelCard.load(run / "publish" / "README.md").data.license == "mit"


def set_config(run: Path, **groups: dict[str, object]) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    for group, values in groups.items():
        config[group] |= values
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def test_published_model_loads_from_the_hub(run: Path, typed: Typed, hub: LocalHub, tmp_path: Path) -> None:
    out = typed("publish", f"run={run}", "repo_id=ada/demo")
    repo = hub.repos["ada/demo"]
    assert repo.private and f"published privately: {hub.url}/ada/demo" in out
    assert hub.log.count("commit") == 1 and len(repo.commits) == 2
    assert repo.files == {p.name: p.read_bytes() for p in (run / "publish").iterdir()}
    assert "put" in hub.log  # the weights went by LFS

    programs = [
        GUIDE.format(name=str(run / "model")),
        GUIDE.format(name="ada/demo"),
        snippet(repo.files["README.md"].decode()),
    ]
    local, published, card = python("\nprint('=====')\n".join(programs), hub, tmp_path / "cache").split("=====\n")
    assert published == local and "Answer:" in local
    assert card.rpartition("Answer:")[2].strip()


def test_existing_repository_is_left_alone_without_update(
    run: Path, typed: Typed, refused: Typed, hub: LocalHub
) -> None:
    typed("publish", f"run={run}", "repo_id=ada/demo")
    error = refused("publish", f"run={run}", "repo_id=ada/demo")
    assert "exists already (HTTP 409)" in error and "update=true" in error
    assert len(hub.repos["ada/demo"].commits) == 2

    hub.repos["ada/demo"].files["model-00001-of-00002.safetensors"] = b"a shard of an earlier version"
    hub.repos["ada/demo"].files["NOTES.md"] = b"somebody's own"
    typed("publish", f"run={run}", "repo_id=ada/demo", "update=true", "license=mit")
    files = hub.repos["ada/demo"].files
    assert b"license: mit" in files["README.md"] and "NOTES.md" in files
    assert [f for f in files if f.endswith(".safetensors")] == ["model.safetensors"]

    hub.repos["ada/demo"].private = False
    assert "is public" in refused("publish", f"run={run}", "repo_id=ada/demo", "update=true")
    assert len(hub.repos["ada/demo"].commits) == 3


@pytest.mark.parametrize("status", [401, 403, 500])
@pytest.mark.parametrize("step", ["create", "commit"])
def test_hub_that_refuses(run: Path, refused: Typed, hub: LocalHub, step: str, status: int) -> None:
    hub.fail[step] = status
    error = refused("publish", f"run={run}", "repo_id=ada/demo")
    said = {401: "HF_TOKEN", 403: "write access to ada/demo", 500: "trouble of its own"}[status]
    assert f"HTTP {status}" in error and said in error and "othing was published" in error
    assert hub.repos == {}


def test_commit_that_conflicts(run: Path, typed: Typed, refused: Typed, hub: LocalHub) -> None:
    typed("publish", f"run={run}", "repo_id=ada/demo")
    hub.fail["commit"] = 409
    error = refused("publish", f"run={run}", "repo_id=ada/demo", "update=true", "license=mit")
    assert "HTTP 409" in error and "publish again with update=true" in error and "is unchanged" in error
    assert len(hub.repos["ada/demo"].commits) == 2


def test_repository_that_cannot_be_taken_away_is_named(run: Path, refused: Typed, hub: LocalHub) -> None:
    hub.fail |= {"commit": 403, "delete": 403}
    assert "delete it by hand" in refused("publish", f"run={run}", "repo_id=ada/demo")
    assert hub.repos["ada/demo"].files == {}


def test_no_hub(run: Path, refused: Typed, hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in refused("publish", f"run={run}", "repo_id=ada/demo")


BAD = {
    "optimizer.pt": b"x",
    "step_00000030/__0_0.distcp": b"x",
    ".env": b"A=1",
    "notes.txt": b"my token is hf_" + b"A" * 34,
    "key.txt": b"-----BEGIN OPENSSH PRIVATE KEY-----",
    "data.json": b'{"path": "/home/ada/data/train.jsonl"}',
    "links.md": b"see https://ada:secret@example.org/x",
    "own.json": json.dumps({"t": TOKEN}).encode(),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses_what_must_not_be_published(run: Path, refused: Typed, hub: LocalHub, name: str) -> None:
    file = run / "model" / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(BAD[name])
    error = refused("publish", f"run={run}", "repo_id=ada/demo")
    assert name in error and "nothing was uploaded" in error
    assert hub.log == [] and not (run / "publish").exists()


def test_refuses_optimiser_state_in_safetensors(run: Path, refused: Typed) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"layers.0.exp_avg": torch.zeros(1)}, run / "model" / "more.safetensors")
    assert "optimiser state: it holds layers.0.exp_avg" in refused(
        "publish", f"run={run}", "repo_id=ada/demo", "dry_run=true"
    )


def test_what_is_inherited_may_hold_slashes(run: Path) -> None:
    tokenizer = json.loads((run / "model" / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({"content": "/usr/bin/env"})
    (run / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))
    (run / "model" / "chat_template.jinja").write_text("</tool> files lie in /mnt/data/x {{ messages }}")
    refuse(run / "model")


def test_bad_names_and_runs(run: Path, refused: Typed, tmp_path: Path) -> None:
    assert "expected user/name" in refused("publish", f"run={run}", "repo_id=demo", "dry_run=true")
    assert "repo_id=a/b c" in refused("publish", f"run={run}", "'repo_id=a/b c'".strip("'"), "dry_run=true")
    shutil.copytree(run / "model", tmp_path / "alone")
    (tmp_path / "alone" / "config.yaml").unlink(missing_ok=True)
    assert "without the run" in refused("publish", f"run={tmp_path / 'alone'}", "repo_id=a/b", "dry_run=true")
    shutil.rmtree(run / "model")
    assert "is not finished" in refused("publish", f"run={run}", "repo_id=a/b", "dry_run=true")


def test_paths_are_relative_to_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Path("/home/ada/lab/runs/sft/1")
    monkeypatch.setenv("HOME", "/home/ada")
    assert relative("/home/ada/lab/runs/sft/1/model", run) == "model"
    assert relative("/home/ada/lab/my data, new/a.jsonl", run) == "../../../my data, new/a.jsonl"
    assert relative("/home/bob/secret/a.jsonl", run) == relative("/mnt/bob/a.jsonl", run) == "a.jsonl"
    assert relative("~/lab/x.jsonl", run) == "../../../x.jsonl"
    assert relative("a=[/home/ada/lab/x/y,/etc/z/w]", run) == "a=[../../../x/y,w]"
    for text in ("https://example.org/a/b", "and/or/else", "../a/b", "</tool/x>", "asset://demo/model", "1/2/3"):
        assert relative(text, run) == text


def test_plot_is_a_drawing_of_the_losses() -> None:
    lines = [{"step": 0, "val/loss": 8.0}] + [{"step": s, "train/loss": 8 / s} for s in range(1, 401)]
    lines += [{"step": 400, "val/loss": 1.0}, {"step": 401, "train/loss": float("nan")}]
    drawing = ElementTree.fromstring(loss_plot(lines))
    drawn = drawing.findall("{*}polyline")
    assert [len(p.get("points").split()) for p in drawn] == [400, 400, 2]
    heights = [float(p.split(",")[1]) for p in drawn[0].get("points").split()]
    assert heights == sorted(heights) and 40 < heights[0] < heights[-1] < 320
    assert loss_plot([{"step": 1}]) is None
    assert ticks(0, 30) == [0, 5, 10, 15, 20, 25, 30] and log_ticks(0.3, 8) == [0.2, 0.5, 1, 2, 5, 10]
    assert ElementTree.fromstring(loss_plot([{"step": 1, "train/loss": 2.0}])).findall("{*}polyline")


@pytest.fixture
def rye(rye_run: Path, tmp_path: Path) -> Path:
    """A copy of the run that was written by hand, with its base and its data beside it."""
    lab = tmp_path / "lab"
    shutil.copytree(rye_run.parent, lab, ignore=shutil.ignore_patterns("evaluate", "publish"))
    for name in ("config.yaml", "environment.json"):
        file = lab / "run" / name
        file.write_text(file.read_text().replace(str(rye_run.parent), str(lab)))
    return lab / "run"


def asked(card: str) -> str:
    """Return the prompt in the card's first program."""
    program: dict[str, str] = {}
    exec(card[card.index("prompt = ") : card.index("inputs = ")], program)
    return program["prompt"]


def test_a_card_written_by_hand_from_a_run_written_by_hand(rye: Path, typed: Typed) -> None:
    """Three evaluations, the best in the middle: the table shows the first and the last."""
    typed("publish", f"run={rye}", "repo_id=ada/rye", "dry_run=true")
    card = ModelCard.load(rye / "publish" / "README.md")
    text = card.content
    assert (
        "# rye\n\n`../base`, fine-tuned on `../questions.jsonl` for 1,008 steps of 12 examples with supervised" in text
    )
    assert "**Validation during training, answers scored on a sample of 2**\n\n| score | before | after |\n" in text
    rows = "| loss | 6.0000 | **3.5000** |\n| perplexity | 403.4 | **33.1200** |\n| f1 | 0.1250 | **0.5000** |\n"
    assert rows in text and "bootstrap" not in text and "Losses are in nats per target" in text
    assert "\npython -m sftlab.train run_dir=. data=squad 'name=rye bread'\n" in text
    assert "| steps | 1,008 |\n| batch size | 12 examples per optimiser step, over all ranks |\n" in text
    assert "| time | 1 h 30 min |\n| software | sftlab 1.2.3, torch 2.11.0 |\n" in text and "| seed | 7 |\n" in text
    assert "Code: sftlab at commit `c0ffee`. Paths are relative" in text
    assert asked(text) == "Context: ... Question: ... Answer:"
    assert text.count("max_new_tokens=3)") == 1 and text.count('"max_tokens": 3,') == 1
    results = {(r.metric_type, r.metric_value, r.dataset_name) for r in card.data.eval_results}
    data = "../questions.jsonl"
    assert "datasets" not in card.data.to_dict() and "base_model" not in card.data.to_dict()  # neither is on the hub
    assert results == {("loss", 3.5, data), ("perplexity", 33.12, data), ("f1", 0.5, data)}
    plot = ElementTree.parse(rye / "publish" / "loss.svg")
    train, val = (p.get("points") for p in plot.findall("{*}polyline"))
    assert len(train.split()) == 8 and val.split()[0] == "62.0,44.0" and val.split()[2].startswith("740.0,")


def test_what_evaluate_measured_is_what_the_card_says(rye: Path, typed: Typed) -> None:
    typed("evaluate", f"run={rye}", "baseline=true", "max_new_tokens=20")
    typed("publish", f"run={rye}", "repo_id=ada/rye", "dry_run=true")
    card = ModelCard.load(rye / "publish" / "README.md")
    loss = (17 * math.log(2) + 3 * math.log(638) + 7 * math.log(320)) / 27  # by hand, as in test_evaluate
    assert "**Evaluation on validation**, 4 examples\n" in card.text
    assert "| f1 | 0.0000 | **0.6667** | +0.6667 | +0.5556 to +1.0000 |\n" in card.text
    assert f"| perplexity | 320.0 | **{math.exp(loss):.4f}** |  |  |\n" in card.text
    assert "Intervals are 95 %, by a paired bootstrap" in card.text
    found = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert found["f1"] == round(2 / 3, 6) and found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


def test_a_prompt_that_is_given_stands_in_the_card(rye: Path, typed: Typed) -> None:
    given = "Say \"rye\", ${x} and 'bread'" + " over many words" * 9
    typed("publish", f"run={rye}", "repo_id=ada/rye", "dry_run=true", f"prompt={given}")
    assert asked((rye / "publish" / "README.md").read_text()) == given


def test_the_commit_says_what_it_is_told_or_what_the_run_came_to(rye: Path, typed: Typed, hub: LocalHub) -> None:
    typed("publish", f"run={rye}", "repo_id=ada/rye")
    typed("publish", f"run={rye}", "repo_id=ada/rye", "update=true", "message=Better rye", "license=mit")
    (rye / "summary.json").unlink()
    typed("publish", f"run={rye}", "repo_id=ada/rye", "update=true", "license=bsd")
    assert hub.repos["ada/rye"].messages == ["rye: 1008 steps, loss 3.5000", "Better rye", "rye: ? steps"]


def test_a_repository_is_private_unless_it_is_said_to_be_public(rye: Path, typed: Typed, hub: LocalHub) -> None:
    assert f"published: {hub.url}/ada/open\n" in typed("publish", f"run={rye}", "repo_id=ada/open", "private=false")
    assert not hub.repos["ada/open"].private
    typed("publish", f"run={rye}", "repo_id=ada/open", "private=false", "update=true", "license=mit")
    typed("publish", f"run={rye}/model", "repo_id=ada/shut", "license=mit")
    shut, opened = hub.repos["ada/shut"], hub.repos["ada/open"]
    assert shut.private and shut.files.keys() == opened.files.keys()
    assert all(shut.files[name] == opened.files[name] for name in shut.files if name != "README.md")


def test_random_weights_inherit_neither_licence_nor_base(rye: Path, typed: Typed) -> None:
    set_config(rye, model={"name_or_path": "asset://demo/model", "init": "random"})
    out = typed("publish", f"run={rye}", "repo_id=ada/rye", "dry_run=true")
    card = ModelCard.load(rye / "publish" / "README.md")
    assert "license" not in card.data.to_dict() and "base_model" not in card.data.to_dict()
    assert "so none is inherited" in card.text and "trained from random weights on" in card.text
    assert "license= states one" in out
    set_config(rye, model={"name_or_path": "ada/base"})
    typed("publish", f"run={rye}", "repo_id=ada/rye", "dry_run=true")
    assert "base_model" not in ModelCard.load(rye / "publish" / "README.md").data.to_dict()


def test_a_commit_that_came_in_between_is_not_overwritten(
    rye: Path, typed: Typed, refused: Typed, hub: LocalHub
) -> None:
    typed("publish", f"run={rye}", "repo_id=ada/rye")
    repo = hub.repos["ada/rye"]
    theirs = {"README.md": b"somebody's own"}
    hub.meanwhile["commit"] = lambda: repo.commits.append(theirs)
    error = refused("publish", f"run={rye}", "repo_id=ada/rye", "update=true", "license=mit")
    assert (
        "HTTP 412" in error and "look at it, then publish again with update=true" in error and "is unchanged" in error
    )
    assert repo.files == theirs and len(repo.commits) == 3


SECRET_URL = "https://ada:moonlight@example.org/data.jsonl"


def test_a_secret_that_only_the_config_holds_is_refused(rye: Path, typed: Typed, refused: Typed, hub: LocalHub) -> None:
    """The model's folder is clean, so only a second look, at what is about to be uploaded, finds it."""
    typed("publish", f"run={rye}", "repo_id=ada/rye", "dry_run=true")
    before = {p.name: p.read_bytes() for p in (rye / "publish").iterdir()}
    config = yaml.safe_load((rye / "config.yaml").read_text()) | {"note": SECRET_URL}
    (rye / "config.yaml").write_text(yaml.safe_dump(config))
    error = refused("publish", f"run={rye}", "repo_id=ada/rye")
    assert "sftlab_config.yaml: a password in a URL" in error and "nothing was uploaded" in error
    assert hub.log == [] and {p.name: p.read_bytes() for p in (rye / "publish").iterdir()} == before
    assert not (rye / ".publish.partial").exists()


def test_one_s_own_token_is_looked_for_in_the_model_and_in_what_came_of_it(
    rye: Path, refused: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks like no token that is known, so that only its value gives it away."""
    monkeypatch.setenv("HF_TOKEN", "moonlight over the bay")
    arguments = ("publish", f"run={rye}", "repo_id=ada/rye", "dry_run=true")
    assert "README.md: your own Hugging Face token" in refused(*arguments, "prompt=moonlight over the bay")
    (rye / "model" / "notes.bin").write_text("moonlight over the bay")
    error = refused(*arguments)
    assert "model is not fit" in error and "notes.bin: your own Hugging Face token" in error


def test_the_folder_holds_files_of_its_own_and_the_card_replaces_the_model_s(rye: Path, typed: Typed) -> None:
    elsewhere = rye / "model" / "model.safetensors"
    (rye / "model" / "README.md").write_text("an old card")
    (rye / "publish").mkdir()
    (rye / "publish" / "left_from_before.txt").write_text("old")
    (rye / ".publish.partial").mkdir()
    (rye / ".publish.partial" / "left_by_a_kill.txt").write_text("old")
    out = typed("publish", f"run={rye}", "repo_id=ada/rye", "dry_run=true")
    names = {p.name for p in (rye / "publish").iterdir()}
    assert "model.safetensors" in names and not names & {"left_from_before.txt", "left_by_a_kill.txt"}
    weights = rye / "publish" / "model.safetensors"
    assert weights.stat().st_nlink == 1 and weights.read_bytes() == elsewhere.read_bytes()
    assert "an old card" not in (rye / "publish" / "README.md").read_text()
    total = sum(p.stat().st_size for p in (rye / "publish").iterdir())
    assert f"{rye / 'publish'}: {len(names)} files, {total / 1024:.1f} KiB\n" in out


def test_a_run_that_kept_no_losses_has_no_plot_and_no_scores(rye: Path, typed: Typed) -> None:
    (rye / "metrics.jsonl").unlink()
    typed("publish", f"run={rye}", "repo_id=ada/rye", "dry_run=true")
    assert not (rye / "publish" / "loss.svg").exists()
    card = (rye / "publish" / "README.md").read_text()
    assert "loss.svg" not in card and "## Scores" not in card and "model-index" not in card


def test_scores_of_a_run_that_was_gone_on_with_have_no_before(rye: Path, typed: Typed) -> None:
    lines = (rye / "metrics.jsonl").read_text().splitlines(keepends=True)
    (rye / "metrics.jsonl").write_text("".join(lines[1:]))
    set_config(rye, evaluation={"num_answers": 0})
    typed("publish", f"run={rye}", "repo_id=ada/rye", "dry_run=true")
    card = (rye / "publish" / "README.md").read_text()
    assert "| loss |  | **3.5000** |\n" in card and "**Validation during training**\n" in card


@pytest.mark.parametrize("given", ["data.format=null", "conversation"])
def test_a_prompt_of_blanks_stands_in_where_there_is_no_form(given: str, rye: Path, typed: Typed) -> None:
    config = yaml.safe_load((rye / "config.yaml").read_text())
    chat = {"_target_": "sftlab.data.formats.chat.Chat", "supervise": "all", "template_path": None}
    config["data"]["format"] = chat if given == "conversation" else None
    (rye / "config.yaml").write_text(yaml.safe_dump(config))
    typed("publish", f"run={rye}", "repo_id=ada/rye", "dry_run=true")
    assert asked((rye / "publish" / "README.md").read_text()) == "..."


@pytest.mark.parametrize(
    ("status", "said"), [(404, "no such repository or user"), (413, "larger than the hub takes"), (418, "as asked")]
)
def test_other_answers_of_the_hub_are_explained(
    status: int, said: str, rye: Path, refused: Typed, hub: LocalHub
) -> None:
    hub.fail["create"] = status
    error = refused("publish", f"run={rye}", "repo_id=ada/rye")
    assert f"making the repository: the hub answers HTTP {status} to repo_id=ada/rye" in error and said in error
    assert "trouble of its own" not in error


def test_an_interruption_leaves_no_empty_repository(rye: Path, hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(HfApi, "upload_folder", interrupted)
    monkeypatch.delenv("HF_TOKEN")  # so that the token that is handed on is the only one
    with pytest.raises(KeyboardInterrupt):
        upload(rye / "model", "ada/rye", private=True, update=False, message="m", token=TOKEN)
    assert hub.repos == {} and hub.log == ["create", "delete"]
    hub.repos["ada/rye"] = Repo(private=True)
    with pytest.raises(KeyboardInterrupt):
        upload(rye / "model", "ada/rye", private=True, update=True, message="m", token=TOKEN)
    assert "ada/rye" in hub.repos
