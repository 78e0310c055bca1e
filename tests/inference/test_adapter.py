"""An adapter after training: the same answers from every door, on no base but its own, and runs that resume."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from starlette.testclient import TestClient
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftlab.inference.adapter import same_place
from sftlab.inference.loaded_model import LoadedModel
from sftlab.inference.trained_model import resolve
from sftlab.models.nf4 import rounded
from sftlab.serving.app import make_app
from sftlab.serving.engine import Engine
from tests.commands import Typed
from tests.runs import Trouble, compose, measured, run_all, run_here
from tests.support import make_model_folder, read_jsonl

pytestmark = [  # of peft, where it is used by itself
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]
HERE = "http://127.0.0.1"
PROMPTS = ["Context: Ada sells tea. Question: What does Ada sell? Answer:", "The keeper", "Bo Bo Bo"]
LONG = 8  # tokens of an answer
SHORT = ("trainer.max_steps=4", "trainer.save_every=2", "optim.lr=0.003", "peft.rank=4", "evaluation.num_answers=0")
# What is trained on the model with a tied head (True) or without.
KINDS: dict[str, tuple[bool, tuple[str, ...]]] = {
    "lora": (False, ("peft=lora",)),
    "dora": (True, ("peft=dora", "peft.targets=[q_proj,down_proj,embed_tokens]")),
    "qlora": (False, ("peft=qlora",)),
    "whole": (True, ("peft=rslora", "peft.targets=v_proj", "peft.modules_to_save=[embed_tokens]")),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    folder = tmp_path_factory.mktemp("bases")
    for tied in (True, False):
        (folder / str(tied)).mkdir()
        make_model_folder(folder / str(tied), tied=tied, hidden_size=64, initializer_range=0.1)
    return {tied: folder / str(tied) for tied in (True, False)}


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, bases: dict[bool, Path], squad_files: tuple[Path, Path]
) -> dict[str, Path]:
    """A run of each kind on two ranks, and its merged model; of LoRA also one that crashed and one resumed from it."""
    from tests.commands import run_here as command

    folder = tmp_path_factory.mktemp("runs")
    planned: list[Any] = [
        compose(folder / name, bases[tied], squad_files, *SHORT, *how) for name, (tied, how) in KINDS.items()
    ]
    for name in ("crashed", "qcrashed"):
        how = KINDS["qlora" if name == "qcrashed" else "lora"][1]
        config = compose(folder / name, bases[False], squad_files, *SHORT, *how)
        planned.append((config, Trouble(crash_at=4)))
    ends = run_all(planned, ranks=2)
    assert [e[0] for e in ends[:-2] if not e[0].startswith("score")] == []
    assert ends[-1] == ends[-2] == ["Crash: ", "Crash: "]
    for name in ("crashed", "qcrashed"):
        for copy in ("resumed", "elastic"):
            shutil.copytree(folder / name, folder / f"{name}-{copy}", symlinks=True)
    again = [compose(folder / f"{n}-resumed", bases[False], squad_files, *SHORT, *KINDS[k][1]) for n, k in
             (("crashed", "lora"), ("qcrashed", "qlora"))]  # fmt: skip
    assert all(e[0].startswith("score") for e in run_all(again, ranks=2))
    for name in KINDS:
        command("export", f"run={folder / name}", "merge=true", f"output={folder / name / 'merged'}", "dtype=float32")
    return {path.name: path for path in folder.iterdir()}


def logits(model: Any) -> torch.Tensor:
    """Return the logits of a text that all models read, relative to their largest."""
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits[0]
    return found / found.abs().max()


def plain(run: Path, base: Path, quantised: bool) -> Any:
    """Return the adapter on its base as anybody without sftlab loads it; a quantised base with its values rounded."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if quantised:
        rounded(model)
    return PeftModel.from_pretrained(model, str(run / "model")).eval()


def answers_of(model: Any, tokenizer: Any) -> list[str]:
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(input_ids=ids, max_new_tokens=LONG, do_sample=False, pad_token_id=2)
        found.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return found


def generated(typed: Typed, run: Path, folder: Path) -> list[str]:
    """Return what `generate` answers."""
    (folder / "asked.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    output = folder / f"{run.parent.name}-{run.name}.jsonl"
    typed("generate", f"run={run}", f"prompts={folder / 'asked.jsonl'}", f"output={output}", f"max_new_tokens={LONG}")
    return [str(line["answer"]).strip() for line in read_jsonl(output)]


def served(run: Path) -> list[str]:
    """Return what the server answers."""
    engine = Engine(LoadedModel.load(resolve(str(run)), torch.device("cpu")))
    with TestClient(make_app(engine, "it"), base_url=HERE) as client:
        asked = [{"model": "it", "prompt": p, "max_tokens": LONG, "temperature": 0} for p in PROMPTS]
        return [client.post("/v1/completions", json=a).json()["choices"][0]["text"].strip() for a in asked]


@pytest.mark.parametrize("kind", KINDS)
def test_gauntlet_43_adapter_merged_model_and_server_agree(
    kind: str, runs: dict[str, Path], bases: dict[bool, Path], typed: Typed, tmp_path: Path
) -> None:
    run, base = runs[kind], bases[KINDS[kind][0]]
    theirs = plain(run, base, kind == "qlora")
    expected = logits(theirs)
    assert (
        float((expected - logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))).abs().max()) > 0.05
    )
    merged = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)
    assert not any("lora" in name for name in load_file(run / "merged/model.safetensors"))
    assert float((logits(merged) - expected).abs().max()) < 1e-5
    ours = LoadedModel.load(resolve(str(run)), torch.device("cpu")).scorer.model
    assert float((logits(ours) - expected).abs().max()) < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    wanted = answers_of(theirs, tokenizer)
    assert len(set(wanted)) == len(PROMPTS)
    assert answers_of(merged, AutoTokenizer.from_pretrained(run / "merged")) == wanted
    assert generated(typed, run, tmp_path) == generated(typed, run / "merged", tmp_path) == wanted
    assert served(run) == served(run / "merged") == wanted


def test_transformers_alone_loads_the_folder_through_peft(runs: dict[str, Path], bases: dict[bool, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(runs["lora"] / "model", dtype=torch.float32)
    assert float((logits(model) - logits(plain(runs["lora"], bases[False], False))).abs().max()) < 1e-5


def test_checkpoints_and_the_model_hold_the_adapter_alone(runs: dict[str, Path], bases: dict[bool, Path]) -> None:
    from sftlab.checkpoints.manifest import Reader

    for kind in KINDS:
        names = set(load_file(runs[kind] / "model/adapter_model.safetensors"))
        assert not any("base_layer" in n or "original_module" in n or "codes" in n for n in names)
        kept = Reader(runs[kind] / "checkpoints/step_00000004").read_metadata().state_dict_metadata
        weights = [n for n in kept if n.startswith("model.")]
        moments = [n for n in kept if n.startswith("optimizer.state.") and n.endswith(".exp_avg")]
        assert len(weights) == len(moments) == len(names) and not any("base_layer" in n for n in kept)
        found = {p.name for p in (runs[kind] / "model").iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "base.json"} <= found
        assert "config.json" not in found and "model.safetensors" not in found


@pytest.mark.parametrize(("name", "kind"), [("crashed", "lora"), ("qcrashed", "qlora")])
def test_a_resumed_adapter_is_the_straight_one(
    name: str, kind: str, runs: dict[str, Path], bases: dict[bool, Path], squad_files: tuple[Path, Path]
) -> None:
    """Bit for bit on two ranks again; on one rank but for rounding."""
    straight = measured(runs[kind])
    assert measured(runs[f"{name}-resumed"]) == straight
    ours, theirs = (load_file(runs[n] / "model/adapter_model.safetensors") for n in (f"{name}-resumed", kind))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    config = compose(runs[f"{name}-elastic"], bases[False], squad_files, *SHORT, *KINDS[kind][1])
    assert run_here(config).startswith("score")
    assert "resumed from" in (runs[f"{name}-elastic"] / "train.log").read_text()
    elastic = measured(runs[f"{name}-elastic"])
    assert elastic.keys() == straight.keys()
    assert all(elastic[key] == pytest.approx(straight[key], rel=1e-5) for key in straight)


# Another base


def test_a_base_with_other_weights_is_refused(
    runs: dict[str, Path], bases: dict[bool, Path], squad_files: tuple[Path, Path], refused: Typed, tmp_path: Path
) -> None:
    """Whoever loads the adapter, and the run itself where it would resume, see that the base is another."""
    base = tmp_path / "base"
    shutil.copytree(bases[False], base)
    config = compose(tmp_path / "run", base, squad_files, *SHORT, "peft=lora", "peft.targets=q_proj")
    assert run_here(config | {"trainer": config["trainer"] | {"max_steps": 2}}).startswith("score")
    assert LoadedModel.load(resolve(str(tmp_path / "run")), torch.device("cpu"))
    weights = load_file(base / "model.safetensors")
    save_file({n: w + 0.001 for n, w in weights.items()}, base / "model.safetensors", metadata={"format": "pt"})
    for command in (("generate", "prompt=a"), ("export", "merge=true")):
        error = refused(command[0], f"run={tmp_path / 'run'}", *command[1:])
        assert "an adapter of another base. The weights in" in error and "bring them back, or train again" in error
    how = (*SHORT, "peft=lora", "peft.targets=q_proj", "trainer.max_steps=2", f"resume={tmp_path / 'run'}")
    ended = run_here(compose(tmp_path / "other", base, squad_files, *how))
    assert "was made with other base" in ended and "the adapter belongs to the earlier ones" in ended


def edited(run: Path, folder: Path, **changes: Any) -> Path:
    """Return a copy of a run whose adapter says something else."""
    shutil.copytree(run, folder, symlinks=True)
    file = folder / "model/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def test_an_adapter_that_names_another_base_than_its_run_is_refused(
    runs: dict[str, Path], bases: dict[bool, Path], refused: Typed, tmp_path: Path
) -> None:
    run = edited(runs["lora"], tmp_path / "run", base_model_name_or_path=str(bases[True]))
    error = refused("generate", f"run={run}", "prompt=a")
    assert (
        f"an adapter of another base. Its adapter_config.json names {bases[True]}" in error
        and str(bases[False]) in error
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron_config={'a': 1} is not known here"),
        ({"peft_type": "IA3"}, "peft_type=IA3, and only LORA"),
        ({"layer_replication": [[0, 1]]}, "layer_replication=[[0, 1]] is not known here"),
    ],
)
def test_settings_that_are_not_known_are_refused(
    changes: dict[str, Any], says: str, runs: dict[str, Path], refused: Typed, tmp_path: Path
) -> None:
    assert says in refused("generate", f"run={edited(runs['lora'], tmp_path / 'run', **changes)}", "prompt=a")


def test_a_folder_without_its_run_says_its_base_and_must_fit_it(
    runs: dict[str, Path], bases: dict[bool, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(runs["qlora"] / "model", tmp_path / "adapter")
    found = LoadedModel.load(resolve(str(tmp_path / "adapter")), torch.device("cpu")).scorer.model
    assert f"is an adapter of {bases[False]}, by its own adapter_config.json" in caplog.text
    assert float((logits(found) - logits(plain(runs["qlora"], bases[False], True))).abs().max()) < 1e-5
    shutil.copytree(runs["lora"] / "model", tmp_path / "misfit")
    small = make_model_folder(tmp_path / "small", tied=False, hidden_size=32)
    (tmp_path / "misfit/base.json").unlink()
    config = tmp_path / "misfit/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(small)}))
    wrong = r"an adapter of another base: 22 of its tensors do not fit .*lora_B\.weight is \(64, 4\) and"
    with pytest.raises(ValueError, match=wrong):
        LoadedModel.load(resolve(str(tmp_path / "misfit")), torch.device("cpu"))


def test_a_base_that_brings_code_needs_the_users_word(
    runs: dict[str, Path], bases: dict[bool, Path], refused: Typed, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases[False], base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "own.Model"}}))
    shutil.copytree(runs["lora"] / "model", tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}))
    assert "brings code of its own" in refused("generate", f"run={tmp_path / 'adapter'}", "prompt=a")


def test_an_adapter_of_random_weights_is_not_used(runs: dict[str, Path], refused: Typed, tmp_path: Path) -> None:
    import yaml

    shutil.copytree(runs["lora"], tmp_path / "run", symlinks=True)
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    config["model"]["init"] = "random"
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config))
    assert "is an adapter of random weights, which no file holds" in refused(
        "generate", f"run={tmp_path / 'run'}", "prompt=a"
    )


def test_merge_without_an_adapter_is_refused(refused: Typed, demo_run: Path) -> None:
    assert "holds a whole model, no adapter. Export it without merge" in refused(
        "export", f"run={demo_run}", "merge=true"
    )


@pytest.mark.parametrize(
    ("recorded", "name", "same"),
    [
        ("org/model", "org/model", True),
        ("org/model", "org/other", False),
        ("/there/lab/models/a", "models/a", True),
        ("/there/lab/models/a", "/here/models/a", False),
        ("/lib/sftlab/assets/demo/model", "asset://demo/model", True),
        ("/somewhere/else", "asset://demo/model", False),
    ],
)
def test_a_record_is_of_the_same_place(recorded: str, name: str, same: bool) -> None:
    assert same_place(recorded, name) == same


# Every command


def test_evaluate_measures_the_adapter_and_its_base(runs: dict[str, Path], typed: Typed) -> None:
    shown = typed("evaluate", f"run={runs['lora']}", "baseline=true", "max_new_tokens=3")
    report = json.loads((runs["lora"] / "evaluate/validation/scores.json").read_text())
    last = json.loads((runs["lora"] / "summary.json").read_text())["last"]
    assert report["scores"]["loss"] == pytest.approx(last["val/loss"], rel=1e-5) and "predictions and scores" in shown
    first = measured(runs["lora"])[0, "val/loss"]
    assert report["baseline"]["loss"] == pytest.approx(first, rel=1e-5) and abs(first - last["val/loss"]) > 0.1


def test_the_card_says_adapter_and_base_and_the_folder_names_no_path(
    runs: dict[str, Path], bases: dict[bool, Path], typed: Typed
) -> None:
    typed("publish", f"run={runs['dora']}", "repo_id=me/mine", "dry_run=true", "license=mit")
    folder = runs["dora"] / "publish"
    card = (folder / "README.md").read_text()
    assert (
        "A DoRA adapter (rank 4) of" in card and "library_name: peft" in card and "base_model_relation: adapter" in card
    )
    assert "pip install peft" in card and "vLLM does not serve this kind of adapter" in card
    assert "| peft | Adapter: rank 4, alpha 32, " in card
    named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == json.loads((folder / "base.json").read_text())["name"] and not named.startswith("/")
    assert not any(str(bases[True]) in file.read_text(errors="replace") for file in folder.iterdir())
    assert f"Its base is a local folder of whoever trained it (`{named}`)" in " ".join(card.split())
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "config.json").exists()
    typed("publish", f"run={runs['lora']}", "repo_id=me/mine", "dry_run=true", "license=mit")
    card = (runs["lora"] / "publish/README.md").read_text()
    assert "--enable-lora --lora-modules me/mine=me/mine --max-lora-rank 8" in card


def test_an_adapter_that_vllm_cannot_serve_is_refused_before_a_word_is_said(
    refused: Typed, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sftlab.serving.servers.has_vllm", lambda python: True)
    error = refused("serve", f"run={runs['dora']}", "engine=vllm", "port=0")
    assert "this adapter is more. Merge it" in error and "merge=true" in error


VLLM_PYTHON = os.environ.get("SFTLAB_VLLM_PYTHON")


@pytest.mark.skipif(not VLLM_PYTHON, reason="SFTLAB_VLLM_PYTHON names no Python that has vLLM")
def test_gauntlet_43_vllm_with_the_adapter_and_with_the_merged_model_agrees(tmp_path: Path, typed: Typed) -> None:
    """The demo's own model: vLLM has no attention for heads as small as those above."""
    from openai import OpenAI

    from tests.serving.test_serve import PROMPTS as QUESTIONS
    from tests.serving.test_serve import complete, serving

    run = tmp_path / "run"
    typed(
        "train",
        "peft=lora",
        "peft.rank=4",
        f"run_dir={run}",
        "trainer.max_steps=40",
        "evaluation.num_answers=0",
        "tracker=none",
    )
    typed("export", f"run={run}", "merge=true", f"output={run}/merged")
    wanted = {}
    for name in (run, run / "merged"):
        (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in QUESTIONS))
        output = tmp_path / f"{name.name}.jsonl"
        typed("generate", f"run={name}", f"prompts={tmp_path}/asked.jsonl", f"output={output}", "max_new_tokens=12")
        wanted[name] = [line["answer"] for line in read_jsonl(output)]
    assert wanted[run] == wanted[run / "merged"]
    theirs = plain(
        run, Path(json.loads((run / "model/adapter_config.json").read_text())["base_model_name_or_path"]), False
    )
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    ids = tokenizer(QUESTIONS[0], return_tensors="pt")["input_ids"]
    out = theirs.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(out, skip_special_tokens=True).strip() == wanted[run][0]
    for name in (run, run / "merged"):
        arguments = (f"run={name}", "engine=vllm", "port=0", f"vllm_python={VLLM_PYTHON}", "name=demo")
        with serving(*arguments) as server, OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            found = [complete(client, p, name="demo").choices[0].text.strip() for p in QUESTIONS]
        # vLLM holds back the bytes of a character that max_new_tokens cut, where we show each as U+FFFD.
        assert [text.rstrip("\ufffd") for text in found] == [text.rstrip("\ufffd") for text in wanted[name]]
