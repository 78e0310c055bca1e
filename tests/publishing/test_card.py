"""The card, its plot and its licence, number by number; and what is kept out of everything that is published."""

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import save_file

from sftlab.publish import size
from sftlab.publishing.card import (
    command,
    evaluations,
    introduction,
    is_hub_id,
    link,
    number,
    provenance,
    python_text,
    sources,
    training,
)
from sftlab.publishing.licence import licence_of
from sftlab.publishing.paths import relative, relative_tree
from sftlab.publishing.plot import log_ticks, loss_plot, smooth, ticks
from sftlab.publishing.refuse import header, refuse
from tests.local_hub import LocalHub, Repo

TRAIN, VAL = "#2563eb", "#dc6803"


def drawn(lines: list[dict[str, Any]]) -> tuple[dict[str, list[str]], list[str], ElementTree.Element]:
    """Return the lines' points by colour, all texts, and the drawing."""
    plot = loss_plot(lines)
    assert plot is not None
    drawing = ElementTree.fromstring(plot)
    points: dict[str, list[str]] = {}
    for found in drawing.findall("{*}polyline"):
        points.setdefault(str(found.get("stroke")), []).append(str(found.get("points")))
    return points, [str(t.text) for t in drawing.findall("{*}text")], drawing


def test_every_point_of_the_plot_lies_where_a_ruler_puts_it() -> None:
    """678 pixels from step 0 to step 2, from 62 on; 268 pixels from loss 1 to loss 3, from 312 up."""
    lines: list[dict[str, Any]] = [{"step": 0, "val/loss": 3.0}, {"step": 1, "train/loss": 2.0}]
    lines += [{"step": 2, "train/loss": 1.0}, {"step": 2, "val/loss": 1.5}]
    points, texts, drawing = drawn(lines)
    assert points == {TRAIN: ["401.0,178.0 740.0,312.0"], VAL: ["62.0,44.0 740.0,245.0"]}
    assert texts[:8] == ["1", "1.5", "2", "2.5", "3", "0", "1", "2"]
    assert texts[8:] == ["training", "validation", "loss, nats per target", "optimiser step"]
    labels = drawing.findall("{*}text")
    assert [t.get("y") for t in labels[:5]] == ["316.0", "249.0", "182.0", "115.0", "48.0"]
    assert [t.get("x") for t in labels[5:8]] == ["62.0", "401.0", "740.0"]
    assert [(c.get("cx"), c.get("cy")) for c in drawing.findall("{*}circle")] == [("62.0", "44.0"), ("740.0", "245.0")]
    keys = [x for x in drawing.findall("{*}line") if x.get("stroke-width") == "3"]
    assert [(k.get("stroke"), k.get("x1")) for k in keys] == [(TRAIN, "62"), (VAL, "172")]


def test_losses_far_apart_are_drawn_on_a_logarithm_s_scale() -> None:
    """The root of 10 lies in the middle between 1 and 10; up to five times the least loss the scale is plain."""
    points, texts, _ = drawn([{"step": s, "train/loss": v} for s, v in ((0, 10.0), (1, 10**0.5), (2, 1.0))])
    assert points == {TRAIN: ["62.0,44.0 401.0,178.0 740.0,312.0"], VAL: [""]}
    assert texts[:4] == ["1", "2", "5", "10"] and "loss, nats per target, log" in texts and "validation" not in texts
    for high, said in ((5.0, "loss, nats per target"), (5.1, "loss, nats per target, log")):
        assert said in drawn([{"step": 0, "val/loss": high}, {"step": 1, "val/loss": 1.0}])[1]
    assert "loss, nats per target" in drawn([{"step": 0, "val/loss": 6.0}, {"step": 1, "val/loss": 0.0}])[1]


def test_a_long_run_has_a_running_mean_over_its_losses() -> None:
    assert smooth([(0, 4.0), (1, 2.0), (2, 6.0), (3, 8.0)], 2) == [(0, 4.0), (1, 3.0), (2, 4.0), (3, 7.0)]
    for num, expected in ((199, 1), (200, 2)):
        lines = [{"step": s, "train/loss": 2.0 + s % 2} for s in range(1, num + 1)]
        points, _, drawing = drawn(lines)
        assert len(points[TRAIN]) == expected
        last = drawing.findall("{*}polyline")[expected - 1]
        heights = {p.split(",")[1] for p in str(last.get("points")).split()[3:]}
        assert heights == ({"178.0"} if num == 200 else {"44.0", "312.0"})  # the mean of 2 and 3, or each of them
        assert last.get("stroke-opacity") == "1.0"


def test_steps_and_losses_that_cannot_be_drawn_are_left_out() -> None:
    points, _, _ = drawn([{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": float("inf")}])
    assert points[TRAIN] == ["740.0,178.0"]
    ends_later, _, _ = drawn([{"step": 1, "train/loss": 2.0}, {"step": 2, "val/loss": 2.0}])
    assert (ends_later[TRAIN], ends_later[VAL]) == (["401.0,178.0"], ["740.0,178.0"])
    only_start, _, _ = drawn([{"step": 0, "val/loss": 2.0}])
    assert only_start[VAL] == ["62.0,178.0"]
    assert loss_plot([]) is None


def test_ticks_are_round_and_reach_around_both_ends() -> None:
    assert ticks(0.9, 3.3) == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    assert ticks(2, 2) == [2.0] and ticks(0, 7) == [0, 2, 4, 6, 8] and ticks(0, 12) == [0, 2, 4, 6, 8, 10, 12]
    assert ticks(0, 15) == [0, 2.5, 5, 7.5, 10, 12.5, 15]
    assert log_ticks(0.002, 3000) == [0.001, 0.01, 0.1, 1, 10, 100, 1000, 10000]
    assert log_ticks(1, 10) == [1, 2, 5, 10] and log_ticks(3, 40) == [2, 5, 10, 20, 50]


def test_scores_are_shown_with_what_they_were_measured_against(tmp_path: Path) -> None:
    gap = {"f1": {"value": -0.125, "low": -0.2, "high": 0.05}}
    reports: dict[str, dict[str, Any]] = {
        "b": {"data": "demo", "examples": 1250, "scores": {"perplexity": 1234.56, "f1": 0.25, "own": 99.99996}},
        "a": {"scores": {"f1": 0.25, "new": 1.0}, "baseline": {"f1": 0.375}, "difference": gap},
    }
    for name, report in reports.items():
        (tmp_path / "evaluate" / name).mkdir(parents=True)
        (tmp_path / "evaluate" / name / "scores.json").write_text(json.dumps(report))
    first, second = evaluations(tmp_path)
    assert (first["title"], first["num"], first["data"], first["intervals"]) == ("Evaluation on a", None, "a", True)
    assert first["head"] == ["score", "base model", "this model", "difference", "95 % interval"]
    assert first["rows"] == [
        ["f1", "0.3750", "**0.2500**", "-0.1250", "-0.2000 to +0.0500"],
        ["new", "", "**1.0000**", "", ""],
    ]
    assert (second["title"], second["num"], second["intervals"]) == ("Evaluation on demo", "1,250", False)
    assert second["head"] == ["score", "this model"]
    assert second["rows"] == [["perplexity", "1,234.6"], ["f1", "0.2500"], ["own", "100.0000"]]
    assert (number(None), number(100.0), number(-250.0)) == ("", "100.0", "-250.0")


def test_every_setting_of_the_training_is_told() -> None:
    run: dict[str, Any] = {
        "seed": 7,
        "trainer": {"batch_size": 12, "clip_grad_norm": None},
        "optim": {
            "_target_": "lab.adamw",
            "_partial_": True,
            "lr": 0.5,
            "foreach": False,
            "eps": None,
            "betas": [0.9, 0],
        },
        "schedule": {"_target_": "lab.cosine", "warmup_steps": 0},
        "parallel": {"_target_": "lab.fsdp2", "replicate": 2, "cpu_offload": True, "param_dtype": "auto"},
        "peft": {},
        "data": {
            "path": "a/b",
            "layout": "packed",
            "overlong": "drop",
            "max_length": 90,
            "format": {"_target_": "x.Squad"},
        },
    }
    environment = {"packages": {"torch": "2.11.0", "sftlab": "1.2", "transformers": "not installed", "numpy": "2"}}
    assert dict(training(run, {"steps": 1008, "wall_s": 5400.0}, environment)) == {
        "steps": "1,008",
        "batch size": "12 examples per optimiser step, over all ranks",
        "optimiser": "adamw: lr 0.5, betas [0.9, 0]",
        "schedule": "cosine: warmup_steps 0",
        "parallelism": "fsdp2: param_dtype auto",
        "gradient clipping": "none",
        "data": "`a/b` as Squad",
        "rows": "layout packed, drop where longer than 90",
        "seed": "7",
        "time": "1 h 30 min",
        "software": "sftlab 1.2, torch 2.11.0",
    }
    run["trainer"]["clip_grad_norm"], run["data"]["max_length"], run["data"]["format"] = 0.5, None, None
    told = dict(training(run, {}, {}))
    assert told["gradient clipping"] == "global norm 0.5" and told["steps"] == "not known" and "time" not in told
    assert told["rows"] == "layout packed, drop where longer than the context" and told["data"] == "`a/b`"


def test_the_introduction_says_what_was_made_of_what() -> None:
    run = {"model": {"init": "pretrained"}, "trainer": {"batch_size": 32}}
    data = {"sources": {"x": {"path": "ada/one"}, "y": {"path": "two.jsonl"}, "z": {"path": "ada/one"}}}
    one, what = "[ada/one](https://huggingface.co/datasets/ada/one)", "[u/m](https://huggingface.co/u/m)"
    told = introduction("u/m", data, {"steps": 2000}, run)
    assert told == (
        f"{what}, fine-tuned on {one} and `two.jsonl` for 2,000 steps of 32 examples with supervised fine-tuning."
    )
    shipped = introduction("asset://demo/model", {"path": "p"}, {}, run)
    assert shipped.startswith("`asset://demo/model` (the demo model that ships with sftlab), fine-tuned on `p` with")
    nothing = introduction("u/m", {}, {}, run | {"model": {"init": "random"}})
    assert nothing == f"A model of the shape of {what}, trained from random weights on `custom data`."
    assert sources(data) == ["ada/one", "two.jsonl"]


def test_only_what_can_be_on_the_hub_is_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "model").mkdir()
    names = ["u/m", "m", "u/m/x", "./m", "~/m", "/m", "a://b", "here/model"]
    assert [name for name in names if is_hub_id(name)] == ["u/m"]
    assert link("u/m", "datasets/") == "[u/m](https://huggingface.co/datasets/u/m)" and link("./m") == "`./m`"


def test_the_command_can_be_typed_again() -> None:
    run = Path("/home/ada/lab/runs/1")
    words = ["/opt/python", "/opt/sftlab/train.py", "run_dir='/home/ada/lab/runs/1'", "name=rye bread", "data=squad"]
    assert command(words, run) == "python -m sftlab.train run_dir=. 'name=rye bread' data=squad"
    installed = ["/opt/python", "/usr/bin/sftlab-train", "data.path='/home/ada/lab/it\\'s.jsonl'", "a='"]
    assert command(installed, run) == "python -m sftlab.train 'data.path=../../it'\"'\"'s.jsonl' 'a='\"'\"''"
    assert command([], run) == "# the run's environment.json names no command"


def test_the_code_is_named_and_so_are_changes_to_it() -> None:
    made = {"git_commit": "c0ffee", "git_diff": "", "packages": {"sftlab": "1.2"}}
    assert provenance(made).startswith("Code: sftlab at commit `c0ffee`. Paths are")
    assert "`c0ffee` with uncommitted changes, which" in provenance(made | {"git_diff": "+x"})
    assert provenance(made | {"git_commit": None}) == "Code: sftlab 1.2, not from a git checkout."
    assert provenance({}) == "Code: sftlab of unknown version, not from a git checkout."


@pytest.mark.parametrize("text", ["short", "a" * 96, "word " * 60 + '"quoted"\nand\\ é', "x" * 300])
def test_a_prompt_in_the_card_is_python_that_gives_the_prompt(text: str) -> None:
    literal = python_text(text)
    assert eval(literal) == text and literal.startswith("(\n") == (len(text) > 96)
    assert all(len(line) < 110 for line in literal.splitlines()) or " " not in text


def test_sizes_are_said_in_the_unit_that_fits() -> None:
    assert [size(n) for n in (0, 1023, 1024, 1536 * 2**10, 2**30)] == ["0 B", "1023 B", "1.0 KiB", "1.5 MiB", "1.0 GiB"]


def base_folder(folder: Path, head: str | None) -> str:
    folder.mkdir()
    if head is not None:
        (folder / "README.md").write_text(f"---\n{head}\n---\n# A base\n")
    return str(folder)


def test_a_licence_is_inherited_stated_or_not_known(tmp_path: Path, hub: LocalHub) -> None:
    """The publisher's word comes first; random weights inherit nothing, not even from a base whose licence is known."""
    mit = base_folder(tmp_path / "mit", "license: mit")
    lamp = base_folder(tmp_path / "lamp", "license: other\nlicense_name: lamp\nlicense_link: LICENSE")
    bare, empty = base_folder(tmp_path / "bare", None), base_folder(tmp_path / "empty", "tags: [a]")
    hub.repos["ada/base"] = Repo(private=False, commits=[{"README.md": b"---\nlicense: gemma\n---\n"}])
    assert licence_of(mit, "bsd", True, False).metadata == {"license": "bsd"}
    for base in ("asset://demo/model", mit, "ada/base"):
        found = licence_of(base, None, True, True)
        assert found.metadata == {} and "random weights, so none is inherited" in found.sentence
    assert licence_of("asset://demo/model", None, False, False).metadata == {"license": "apache-2.0"}
    assert licence_of(mit, None, False, False).sentence.startswith("`mit`, inherited from the base model")
    named = licence_of(lamp, None, False, False)
    assert named.metadata == {"license": "other", "license_name": "lamp", "license_link": "LICENSE"}
    assert named.sentence.startswith("`other` (lamp), inherited")
    for base in (bare, empty):
        assert licence_of(base, None, False, False).sentence == (
            "Not known: no licence could be read from the base model's card. Its terms apply."
        )
    assert licence_of("ada/base", None, False, True).metadata == {"license": "gemma"}
    asked = len(hub.log)
    unasked = licence_of("ada/base", None, False, False)
    assert unasked.metadata == {} and "(it was not asked: this is a dry run)" in unasked.sentence
    assert len(hub.log) == asked
    gone = licence_of("ada/none", None, False, True)
    assert gone.metadata == {} and "dry run" not in gone.sentence


def test_paths_in_a_tree_and_in_sentences_are_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    run = Path("/home/ada/lab/runs/1")
    tree = {"a": ["/home/ada/lab/x.jsonl", 3, None], "b": {"c": "see /home/ada/lab/y/z, or /opt/data/w"}}
    assert relative_tree(tree, run) == {"a": ["../../x.jsonl", 3, None], "b": {"c": "see ../../y/z, or w"}}
    assert relative("C:\\Users\\ada\\x.jsonl", run) == "x.jsonl"
    assert relative("/home/ada/lab\n/home/ada/lab/x/y", run) == "../..\n../../x/y"


KEPT_OUT = {
    "optimizer.bin": "optimiser state or a checkpoint",
    "deep/scheduler.json": "optimiser state or a checkpoint",
    "rng_state_0.bin": "optimiser state or a checkpoint",
    "checkpoint-500/config.json": "optimiser state or a checkpoint",
    "TRAINING_ARGS.bin": "optimiser state or a checkpoint",
    "model.pth": "optimiser state or a checkpoint",
    ".metadata": "optimiser state or a checkpoint",
    ".env.local": "secrets are kept",
    "deep/id_ed25519": "secrets are kept",
    "server.pem": "secrets are kept",
    "token": "secrets are kept",
}
LET_THROUGH = ["config.json", "tokenizer.json", "token.md", "optimal.md", "step_up.md", "environment.md", "pth.md"]


@pytest.mark.parametrize("name", KEPT_OUT)
def test_files_are_refused_by_their_names(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=rf"  {re.escape(name)}: .*{KEPT_OUT[name]}"):
        refuse(tmp_path)


def test_files_of_like_names_are_let_through(tmp_path: Path) -> None:
    for name in LET_THROUGH:
        (tmp_path / name).write_text("{}")
    refuse(tmp_path)


def test_one_s_own_token_is_refused_whatever_it_looks_like(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"\0 my-odd-token \0")
    refuse(tmp_path)
    refuse(tmp_path, "another-token")
    with pytest.raises(ValueError, match=r"weights.bin: your own Hugging Face token"):
        refuse(tmp_path, "my-odd-token")


def test_weights_are_refused_by_their_header(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"layers.0.weight": torch.zeros(2), "layers.0.exponent": torch.zeros(1)}, file, {"format": "pt"})
    refuse(tmp_path)
    assert set(header(file)) == {"layers.0.weight", "layers.0.exponent", "__metadata__"}
    save_file({"a": torch.zeros(1), "a.exp_avg": torch.zeros(1), "state.b": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"optimiser state: it holds a.exp_avg and 1 more such"):
        refuse(tmp_path)
    save_file({"a": torch.zeros(1)}, file, {"note": "hf_" + "A" * 34})
    with pytest.raises(ValueError, match=r"model.safetensors: a Hugging Face token"):
        refuse(tmp_path)
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"is no safetensors file, or half of one"):
        refuse(tmp_path)


def test_paths_of_this_machine_are_refused_where_text_is_not_learned(tmp_path: Path) -> None:
    template = {"chat_template": "{{ '/usr/share/x/y' }}", "a": ["text"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(template))
    (tmp_path / "vocab.json").write_text(json.dumps({"/usr/bin/env": 1, "a": "/usr/bin/env"}))
    (tmp_path / "weights.bin").write_text("/usr/share/x/y")
    refuse(tmp_path)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "notes.yaml").write_text("a: /mnt/b/c\nb: /mnt/a/c\n")
    (tmp_path / "generation_config.json").write_text(json.dumps({"deep": [{"x": "/srv/x/y"}]}))
    with pytest.raises(ValueError) as refusal:
        refuse(tmp_path)
    assert "  deep/notes.yaml: an absolute path of this machine: /mnt/a/c and 1 more\n" in str(refusal.value)
    assert "  generation_config.json: an absolute path of this machine: /srv/x/y\n" in str(refusal.value)
