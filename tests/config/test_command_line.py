"""The command line: help, composing without torch, completion, and errors that name the nearest right thing."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from sftlab import train
from sftlab.config import groups, overrides, unknown
from tests.support import REPO, command

Refused = Printed = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Refused:
    """Run `train` in an empty folder, in this process (importing torch takes seconds); see that it exits with 1, one
    error, no traceback and nothing on the disk; return the error."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["sftlab-train", *arguments])
        with pytest.raises(SystemExit) as stop:
            train.main()
        out, error = capfd.readouterr()
        assert (stop.value.code, out) == (1, "")
        assert error.startswith("error: ") and "Traceback" not in error and "Error executing" not in error
        assert [p.name for p in tmp_path.iterdir() if p.name != "mine"] == ["here"] and list(here.iterdir()) == []
        return error

    return run


@pytest.fixture
def printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Printed:
    """Run `python -m sftlab.train` in this process, see that it says nothing on standard error and does not fail;
    return what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [train.__file__, *arguments])
        try:
            train.main()
        except SystemExit as stop:
            assert stop.code in (None, 0)
        out, error = capfd.readouterr()
        assert error == ""
        return out

    return run


def test_help_shows_groups_options_and_three_examples(printed: Printed) -> None:
    shown = printed("--help")
    for group in ("model", "peft", "data", "optim", "schedule", "parallel", "launcher", "tracker", "experiment"):
        assert f"{group}: {', '.join(groups.options(group))}" in shown
    assert "hydra" not in shown.lower() and not re.search(r"\bbase\b", shown.partition("\n\n")[2])
    assert sum(line.startswith("  python -m sftlab.train") for line in shown.splitlines()) == 3
    assert "--cfg job" in shown


def test_composing_imports_nothing_heavy(tmp_path: Path) -> None:
    """One process composes and helps, as `python -m sftlab.train` does, and names what it has imported by then."""
    probe = (
        "import contextlib, io, json, runpy, sys\n"
        "heavy = ('torch', 'transformers', 'datasets', 'numpy', 'pandas', 'pyarrow', 'tensorboard')\n"
        "for flags in json.loads(sys.argv.pop()):\n"
        "    sys.argv[1:] = flags\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):\n"
        "        runpy.run_module('sftlab.train', run_name='__main__', alter_sys=True)\n"
        "    print(json.dumps([out.getvalue(), [m for m in heavy if m in sys.modules]]))\n"
    )
    typed = [["--cfg", "job"], ["--help"], ["model=llama3_2_1b", "data=squad", "--cfg", "job"]]
    done = subprocess.run(
        [sys.executable, "-c", probe, json.dumps(typed)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for (said, imported), expected in zip(found, ("\ntrainer:", "Groups", "meta-llama/Llama-3.2-1B"), strict=True):
        assert expected in said and imported == []


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("python -m sftlab.train optim.l", "optim.lr="),
        (
            "python3 -m sftlab.train model=lla",
            "model=llama3_1_70b model=llama3_1_8b model=llama3_2_1b model=llama3_2_3b",
        ),
        (".venv/bin/python -m sftlab.train seed=1 sched", "schedule. schedule="),
        ("sftlab-train trainer.max_s", "trainer.max_steps="),
        ("sftlab-train data=b", ""),
    ],
)
def test_completion_answers(typed: str, expected: str, printed: Printed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_LINE", typed)
    monkeypatch.setenv("COMP_POINT", str(len(typed)))
    assert printed("-sc", "query=bash").split() == expected.split()


def test_completion_in_a_shell(tmp_path: Path) -> None:
    """What a person sees: install as the README says, type, press tab."""
    script = f"""
        PATH={Path(sys.executable).parent}:$PATH
        eval "$(python -m sftlab.train -sc install=bash)"
        COMP_LINE='python -m sftlab.train trainer.keep' COMP_WORDS=(python -m sftlab.train trainer.keep) COMP_CWORD=3
        COMP_POINT=${{#COMP_LINE}}
        $(complete -p python | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        echo "${{COMPREPLY[@]}}"
        sftlab() {{ python -m sftlab "$@"; }}
        COMP_LINE='sftlab train trainer.keep' COMP_WORDS=(sftlab train trainer.keep) COMP_CWORD=2 COMPREPLY=()
        COMP_POINT=${{#COMP_LINE}}
        $(complete -p sftlab | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        echo "sftlab: ${{COMPREPLY[@]}}"
        COMP_LINE='python other.py a' COMP_WORDS=(python other.py a) COMP_CWORD=2 COMPREPLY=()
        $(complete -p python | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        echo "other: ${{COMPREPLY[@]}}"
        COMP_LINE='python -m other a' COMP_WORDS=(python -m other a) COMP_CWORD=3 COMPREPLY=()
        $(complete -p python | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        echo "other module: ${{COMPREPLY[@]}}"
    """
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [
        "trainer.keep_checkpoints=",
        "sftlab: trainer.keep_checkpoints=",
        "other: ",
        "other module: ",
    ], done.stderr


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("trainer.max_step=3", "trainer.max_step: no such key; did you mean trainer.max_steps?"),
        ("optm.lr=3", "optm.lr: no such key; did you mean optim.lr?"),
        ("sed=1", "sed: no such key; did you mean seed?"),
        ("modle=demo", "modle: no such key; did you mean model?"),
        ("optim=adamv", "optim=adamv: no such option; did you mean adamw?"),
        ("model=llama3_2_1B", "model=llama3_2_1B: no such option; did you mean llama3_2_1b?"),
        ("experiment=llama3_2_squad", "did you mean llama3_2_1b_squad?"),
        (
            "+trainer.max_step=3",
            "trainer.max_step: sftlab.training.settings.TrainerSettings takes no such key; did you mean max_steps?",
        ),
        ("+optim.bettas=[0,1]", "did you mean betas?"),
        ("+data.format.lowr=1", "data.format.lowr: "),
        ("+sede=1", "sede: no such key; did you mean seed?"),
        ("~trainer.batch_size", "trainer.batch_size is missing: give it a value, trainer.batch_size=..."),
        ("evaluation.answers=4", "evaluation.answers: it is now called evaluation.num_answers"),
        ("sweeper.n_trials=4", "sweeper.n_trials: it is now called sweeper.num_trials"),
        ("resume_anyway=true", "resume_anyway: it is now called resume_despite_changes"),
        ("+resume_anyway=true", "resume_anyway: it is now called resume_despite_changes"),
        ("optim._target_=sftlab.optim.adamw", "optim._target_=sftlab.optim.adamw: it has moved to sftlab.training.opt"),
    ],
)
def test_gauntlet_28_an_unknown_key_on_the_command_line_is_an_error(argument: str, said: str, refused: Refused) -> None:
    assert said in refused(argument)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trainr:\n  max_steps: 3\n", "trainr: no such key; did you mean trainer?"),
        ("max_steps: 3\n", "max_steps: no such key"),
        (
            "trainer:\n  max_stps: 3\n",
            "trainer.max_stps: sftlab.training.settings.TrainerSettings takes no such key; did you mean max_steps?",
        ),
        ("optim:\n  learning_rate: 1\n", "optim.learning_rate: sftlab.training.optim.adamw takes no such key"),
        ("schedule:\n  warm_up_steps: 1\n", "did you mean warmup_steps?"),
        ("data:\n  max_lenght: 64\n", "did you mean max_length?"),
        ("data:\n  format:\n    lower: true\n", "data.format.lower: sftlab.data.formats.squad.Squad takes no such key"),
        ("evaluation:\n  answer: 1\n", "did you mean num_answers?"),
        ("launcher:\n  nodes: 2\n", "launcher.nodes: "),
        ("defaults:\n  - override /optim: adamv\n", "optim=adamv: no such option; did you mean adamw?"),
    ],
)
def test_gauntlet_28_an_unknown_key_in_any_yaml_is_an_error(
    text: str, said: str, tmp_path: Path, refused: Refused
) -> None:
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    (folder / "typo.yaml").write_text("# @package _global_\n" + text)
    assert said in refused("--config-dir", str(tmp_path / "mine"), "experiment=typo")


def test_a_right_yaml_outside_the_project_is_taken(tmp_path: Path, printed: Printed) -> None:
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    (folder / "right.yaml").write_text("# @package _global_\ntrainer:\n  max_steps: 3\n")
    shown = printed("--config-dir", str(tmp_path / "mine"), "experiment=right", "--cfg", "job")
    assert yaml.safe_load(shown)["trainer"]["max_steps"] == 3


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".", "''", "/tmp/x", "'a '"])
def test_a_name_that_would_leave_its_folder_is_refused(name: str, refused: Refused) -> None:
    error = refused(f"name={name}")
    assert error.startswith("error: name=") and "would leave its folder" in error


@pytest.mark.parametrize("name", ["../x", "a/b"])
def test_so_is_a_sweeps(name: str, refused: Refused) -> None:
    assert "would leave its folder" in refused("-m", f"name={name}", "seed=0,1")


def test_the_process_says_so_too(tmp_path: Path) -> None:
    done = command("train", "trainer.batch_size=0", cwd=tmp_path, cold=True)
    assert (done.returncode, done.stdout) == (1, "") and list(tmp_path.iterdir()) == []
    assert done.stderr == "error: trainer.batch_size=0: expected a whole number of at least 1\n"


def test_nodes_without_a_launcher_say_which_launchers_take_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    error = refused("launcher.nodes=2")
    takers = [o for o in groups.options("launcher") if "nodes" in groups.keys_of_option("launcher", o)]
    assert error.startswith("error: launcher.nodes: ") and all(f"launcher={t}" in error for t in takers)

    (tmp_path / "launcher").mkdir()
    (tmp_path / "launcher" / "none.yaml").write_text("{}\n")
    (tmp_path / "launcher" / "slurm.yaml").write_text("# @package _global_\nlauncher:\n  nodes: 1\n")
    monkeypatch.setattr(groups, "CONF", tmp_path)
    said = unknown.unknown_key("launcher.nodes", ["launcher"])
    assert said == "launcher.nodes: the chosen launcher option has no such key; it belongs to launcher=slurm"


@pytest.mark.parametrize(
    ("typed", "quoted"),
    [
        ("data.path=a,b[1]=c.jsonl", "data.path='a,b[1]=c.jsonl'"),
        ("run_dir=it's here", r"run_dir='it\'s here'"),
        ("vllm_python=~/vllm/bin/python", "vllm_python='~/vllm/bin/python'"),  # zsh leaves the ~ to us
        ("prompt=Who? {a: b}", "prompt='${given:prompt}'"),
        (r"data.path=back\slash\ ".rstrip(), r"data.path='back\slash\\'"),
        ("data.val_path=null", "data.val_path=null"),
        ("data.path='a b'", "data.path='a b'"),
        ("optim.lr=1e-4,1e-3", "optim.lr=1e-4,1e-3"),
    ],
)
def test_free_text_reaches_hydra_quoted(typed: str, quoted: str) -> None:
    assert overrides.quote(typed, multirun=False) == quoted


def test_paths_with_commas_brackets_and_quotes_arrive_as_typed(printed: Printed) -> None:
    path = r"it's, [a] {b}=c\d $e.jsonl"
    shown = printed(f"data.path={path}", "--cfg", "job", "--package", "data")
    assert yaml.safe_load(shown)["path"] == path
