"""A run or sweep that somebody else made: its files name no code, no command and no place outside of it."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sftlab import sweep as sweeping
from sftlab.common.files import LinkRefused
from sftlab.config import trust
from sftlab.config.grid import planned
from sftlab.config.trust import Untrusted, refuse_code, refuse_launcher
from sftlab.evaluate import offer_own_data
from sftlab.inference.trained_model import resolve
from sftlab.launchers import launcher as launchers
from sftlab.launchers.launcher import LaunchError, Points, make_launcher
from sftlab.launchers.slurm import Slurm
from sftlab.launchers.snapshot import snapshot
from sftlab.launchers.submitted import Exposed, refuse_exposed
from sftlab.scoring.on_data import own_name
from sftlab.sweeps import again
from sftlab.sweeps.record import Sweep
from tests.commands import Typed

LOCAL = {"_target_": "sftlab.launchers.local.Local", "processes_per_node": 1, "parallel_points": 1, "dry_run": False}
Edit = Callable[[dict[str, Any]], None]


def edit(file: Path, change: Edit) -> None:
    config = yaml.safe_load(file.read_text())
    change(config)
    file.write_text(yaml.safe_dump(config))


@pytest.fixture
def run(rye_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, to be made hostile."""
    shutil.copytree(rye_run, tmp_path / "run")
    return tmp_path / "run"


def format_is(**node: Any) -> Edit:
    return lambda config: config["data"].update(format=node)


CODE_IN_CONFIG: dict[str, Edit] = {
    "os.mkdir": format_is(_target_="os.mkdir", path="it_ran"),
    "a function of sftlab that writes": format_is(_target_="sftlab.common.files.write_whole", path="it_ran", text="x"),
    "a class of sftlab of another kind": format_is(_target_="sftlab.training.settings.TrainerSettings", batch_size=1),
    "nested in a format": format_is(_target_="sftlab.data.formats.squad.Squad", x=[{"_target_": "os.getcwd"}]),
    "in place of the data": lambda config: config.update(data={"_target_": "os.mkdir", "path": "it_ran"}),
    "no text": format_is(_target_=["os.mkdir"], path="it_ran"),
}


@pytest.mark.parametrize("how", CODE_IN_CONFIG)
@pytest.mark.parametrize("command", ["generate", "evaluate", "publish"])
def test_a_class_that_a_run_names_is_refused_by_its_key(
    how: str, command: str, run: Path, refused: Typed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    edit(run / "config.yaml", CODE_IN_CONFIG[how])
    more = {"generate": ["prompt=hi"], "evaluate": ["limit=1"], "publish": ["repo_id=a/b", "dry_run=true"]}[command]
    error = refused(command, f"run={run}", *more)
    assert "names code that is not sftlab's" in error and "_target_=" in error and "trust=true allows it" in error
    assert not (tmp_path / "it_ran").exists() and not (run / "publish").exists()


OWN = """
from pathlib import Path
from sftlab.data.formats.squad import Squad
Path({marker!r}).touch()
class Mine(Squad):
    pass
"""


def test_a_format_of_one_s_own_needs_the_word_once_or_none_at_all(
    run: Path, typed: Typed, refused: Typed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "my_format.py").write_text(OWN.format(marker=str(tmp_path / "it_ran")))
    monkeypatch.syspath_prepend(str(tmp_path))
    edit(run / "config.yaml", lambda config: config["data"]["format"].update(_target_="my_format.Mine"))
    asked = ("generate", f"run={run}", "fields.context=c", "fields.question=q", "max_new_tokens=9")
    assert "data.format._target_=my_format.Mine" in refused(*asked) and not (tmp_path / "it_ran").exists()
    assert "rye bread" in typed(*asked, "trust=true") and (tmp_path / "it_ran").exists()
    monkeypatch.setenv("SFTLAB_TRUST", "other, my_format")
    assert "rye bread" in typed(*asked)
    assert "predictions and scores" in typed("evaluate", f"run={run}", "limit=1", "max_new_tokens=3")
    monkeypatch.setenv("SFTLAB_TRUST", "my_formats")  # a name that only begins alike
    refused(*asked)


LOOKED_UP = {
    "the environment": "${oc.env:DEMO_TOKEN}",
    "with a default": "${oc.env:DEMO_TOKEN,x}",
    "within a text": "data-${oc.env:DEMO_TOKEN}.jsonl",
    "escaped once": "\\${oc.env:DEMO_TOKEN}",
    "decoded": "${oc.decode:${oc.env:DEMO_TOKEN}}",
}


@pytest.mark.parametrize("how", LOOKED_UP)
def test_an_interpolation_in_a_stored_config_is_text(
    how: str, run: Path, refused: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEMO_TOKEN", "abcXYZ0123")
    edit(run / "config.yaml", lambda config: config["data"].update(val_path=LOOKED_UP[how]))
    error = refused("evaluate", f"run={run}", "answers=false")
    assert "abcXYZ0123" not in error and f"{LOOKED_UP[how]}" in error


def test_constructors_are_given_texts_as_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    from sftlab.config.binding import instantiate

    monkeypatch.setenv("DEMO_TOKEN", "abcXYZ0123")
    node = {"_target_": "builtins.dict", "a": "${oc.env:DEMO_TOKEN}", "b": [{"c": "${a}"}]}
    assert instantiate(node) == {"a": "${oc.env:DEMO_TOKEN}", "b": [{"c": "${a}"}]}
    assert instantiate({"_target_": "builtins.dict", "_partial_": True, "x": 1})() == {"x": 1}


def test_a_defaults_list_in_a_stored_config_composes_nothing(run: Path, refused: Typed) -> None:
    edit(run / "config.yaml", lambda config: config["data"].update(defaults=[{"/hydra/launcher": "submitit_local"}]))
    assert "its data" not in refused("evaluate", f"run={run}", "limit=1")


@pytest.mark.parametrize("word", ["--help", "-h", "--hydra-help"])
def test_help_opens_nothing(word: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: Any) -> Any:
        raise AssertionError("a file of the run was read")

    monkeypatch.setattr("sftlab.common.run_directory.read_yaml", opened)
    offer_own_data([f"run={run}", word])
    with pytest.raises(AssertionError):
        offer_own_data([f"run={run}"])


def test_naming_a_checkpoint_for_evaluation_exports_nothing_before_the_command_runs(run: Path) -> None:
    step = run / "checkpoints/step_00000008"
    step.mkdir(parents=True)
    (step / "checkpoint.json").write_text("{}")
    offer_own_data([f"run={step}", "--cfg", "job"])
    assert not (run / "export").exists()


CODE = """
from pathlib import Path
from transformers import LlamaConfig
Path({m!r}).touch()
class C(LlamaConfig):
    model_type = "own"
"""
AUTO_MAPS: dict[str, dict[str, Any]] = {
    "config.json": {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.C"}},
    "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["tokenization_own.T", None]}},
    "generation_config.json": {"auto_map": "own.generate"},
    "config.json (a kernel)": {"attn_implementation": "somebody/kernel"},
}


@pytest.mark.parametrize("how", AUTO_MAPS)
def test_a_model_s_own_code_runs_only_by_the_user_s_word(
    how: str, run: Path, refused: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    edit(run / "config.yaml", lambda config: config["model"].update(trust_remote_code=True))
    file = run / "model" / how.split()[0]
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | AUTO_MAPS[how]))
    (run / "model/configuration_own.py").write_text(CODE.format(m=str(tmp_path / "it_ran")))
    error = refused("generate", f"run={run}", "prompt=hi")
    assert "brings code of its own" in error and "trust=true allows it" in error and "model.trust_remote_code" in error
    assert not (tmp_path / "it_ran").exists()


def test_with_the_word_it_is_said_what_runs(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = run / "model/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | AUTO_MAPS["config.json"]))
    with caplog.at_level("WARNING"), pytest.raises(ValueError, match="does not load"):
        resolve(str(run), trust=True).load_config()  # the file with the code is not there
    assert "will run on this machine: configuration_own.C" in caplog.text


COMMANDS = {
    "evaluate": ("sftlab.evaluate.resolve", ["run=x"]),
    "generate": ("sftlab.inference.trained_model.resolve", ["run=x", "prompt=hi"]),
    "serve": ("sftlab.serving.session.resolve", ["run=x"]),
    "publish": ("sftlab.publishing.publication.resolve", ["run=x", "repo_id=a/b"]),
    "export": ("sftlab.inference.trained_model.export_checkpoint", ["run=x"]),
    "sweep": ("sftlab.sweeps.again.retry", ["dir=x", "retry=failed"]),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("word", [[], ["trust=false"], ["trust=true"]])
def test_the_word_of_the_command_line_reaches_what_may_run(
    command: str, word: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib import import_module

    heard: list[Any] = []

    def hears(*arguments: Any, **named: Any) -> Any:
        heard.append(named["trust"] if named else arguments[-1])
        raise ValueError("heard")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "x/checkpoints/step_00000001").mkdir(parents=True)
    (tmp_path / "x/checkpoints/step_00000001/checkpoint.json").write_text("{}")
    (tmp_path / "x/multirun.yaml").write_text("")
    name, typed = COMMANDS[command]
    monkeypatch.setattr(name, hears)
    monkeypatch.setattr(sys, "argv", [f"sftlab-{command}", *typed, *word])
    with pytest.raises(SystemExit):
        import_module(f"sftlab.{command}").main()
    assert heard == [word == ["trust=true"]]


# ---- sweeps ------------------------------------------------------------------------------------------------


def make_sweep(folder: Path, **record: Any) -> Path:
    """A sweep of one point that failed."""
    (folder / "0").mkdir(parents=True)
    point = {"num": 0, "overrides": ["optim.lr=1"], "job_id": None, "run_dir": "0"}
    known = {"cwd": str(folder), "command": ["x"], "launcher": LOCAL, "points": [point]}
    (folder / "sweep.json").write_text(json.dumps(known | record))
    (folder / "0/config.yaml").write_text(yaml.safe_dump({"resume": "auto", "run_dir": str(folder / "0")}))
    (folder / "0/overrides.yaml").write_text("[]\n")
    (folder / "0/summary.json").write_text(json.dumps({"status": "failed", "error": "oops \x1b]0;TITLE\x07"}))
    return folder


def show(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["sftlab-sweep", *arguments])
    sweeping.main()


def slurm(**changes: Any) -> dict[str, Any]:
    from sftlab.config.groups import CONF

    return {**yaml.safe_load((CONF / "launcher/slurm.yaml").read_text())["launcher"], **changes}


def point(**changes: Any) -> dict[str, Any]:
    return {"points": [{"num": 0, "overrides": [], "job_id": None, "run_dir": "0"} | changes]}


RECORDS: dict[str, dict[str, Any]] = {
    "a launcher that is none": {"launcher": {"_target_": "os.mkdir", "path": "it_ran"}},
    "a launcher of another kind": {"launcher": {"_target_": "sftlab.common.files.write_whole", "path": "it_ran"}},
    "shell lines": {"launcher": slurm(setup=["touch it_ran"])},
    "a Python of its own": {"launcher": slurm(python="sh -c 'touch it_ran'")},
    "a prolog": {"launcher": slurm(sbatch={"task-prolog": "it_ran.sh"})},
    "a point outside": point(run_dir="../../mine"),
    "a point at a path": point(run_dir="/etc"),
    "a point that is an option": point(num="0"),
    "an id that is an option": point(job_id="--user=me"),
    "a line break in the name": {"name": "x\n#SBATCH --wrap=touch"},
    "a launcher that is a list": {"launcher": [LOCAL]},
    "overrides that are no texts": point(overrides=[{"a": 1}]),
}


@pytest.mark.parametrize("how", RECORDS)
def test_a_sweep_s_record_starts_nothing_of_its_own(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = make_sweep(tmp_path / "s", **RECORDS[how])
    with pytest.raises(SystemExit) as stop:
        show(monkeypatch, f"dir={folder}", "retry=failed")
    said = capsys.readouterr()
    assert stop.value.code == 1 and ("sweep.json" in said.err) and "Traceback" not in said.err
    assert not (tmp_path / "it_ran").exists() and not list(folder.glob("code*")) and not (folder / ".submitit").exists()


POINTS: dict[str, dict[str, Any]] = {
    "a format": {"data": {"format": {"_target_": "os.mkdir", "path": "it_ran"}}},
    "a tracker": {"tracker": {"_target_": "os.mkdir", "path": "it_ran"}},
    "a schedule": {"schedule": {"_target_": "shutil.rmtree", "_partial_": True, "path": "x"}},
    "remote code": {"model": {"name_or_path": "somebody/model", "trust_remote_code": True}},
}


@pytest.mark.parametrize("how", POINTS)
def test_a_point_s_config_is_refused_before_it_is_started_again(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for launcher in (LOCAL, {}):
        folder = make_sweep(tmp_path / ("s" if launcher else "here"), launcher=launcher)
        edit(folder / "0/config.yaml", lambda config: config.update(POINTS[how]))
        with pytest.raises(SystemExit):
            show(monkeypatch, f"dir={folder}", "retry=failed")
        assert "names code that is not sftlab's" in capsys.readouterr().err
        assert not (tmp_path / "it_ran").exists() and not list(folder.glob("code*"))


def test_the_word_starts_what_was_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(again, "launch", lambda found, nums, options: started.append((nums, options)))
    folder = make_sweep(tmp_path / "s", launcher=slurm(setup=["module load x"]))
    with pytest.raises(Untrusted, match=r"launcher\.setup=.*module load x"):
        again.retry(Sweep.read(folder).observed({}), sweeping_console())
    again.retry(Sweep.read(folder).observed({}), sweeping_console(), trust=True)
    assert started == [([0], slurm(setup=["module load x"]))]


def sweeping_console() -> Any:
    from sftlab.common.terminal import Terminal

    return Terminal(quiet=True)


def test_options_of_this_installation_and_of_earlier_versions_need_no_word() -> None:
    old = {**LOCAL, "_target_": "sftlab.launcher.local.Local"}
    from sftlab.common.renamed import in_todays_names

    refuse_launcher(in_todays_names(old), "sweep.json")
    refuse_launcher(slurm(partition="gpu", nodes=4), "sweep.json")
    refuse_launcher(slurm(setup=["export NCCL_DEBUG=WARN"]), "sweep.json")  # as conf/launcher/slurm_a100.yaml has it
    for group in trust.GROUPS:
        for node in trust.options_of(group, trust.folders()):
            body = node.get(group, node)
            refuse_code({group: body if isinstance(body, dict) else node}, "conf")


def test_a_sweep_of_an_earlier_version_starts_its_points_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_sweep(tmp_path / "s", launcher={**LOCAL, "_target_": "sftlab.launcher.local.Local"})
    optim = {"_target_": "sftlab.optim.adamw", "lr": 1.0}
    edit(folder / "0/config.yaml", lambda config: config.update(optim=optim, resume_anyway=False))
    started: list[Any] = []
    monkeypatch.setattr(again, "launch", lambda found, nums, options: started.append((nums, options)))
    again.retry(Sweep.read(folder).observed({}), sweeping_console())
    assert started == [([0], LOCAL)]


@pytest.mark.parametrize("here", [True, False])
def test_a_record_s_working_directory_is_imported_from_only_if_the_user_is_in_it(
    here: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    monkeypatch.chdir(theirs if here else tmp_path)
    points = Points(tmp_path / "s", "x", str(theirs), tmp_path / "code", {})
    assert points.imports == [str(tmp_path / "code"), *([str(theirs)] if here else [])]
    script = make_launcher(slurm()).script(points)
    assert f"PYTHONPATH={tmp_path}/code{f':{theirs}' if here else ''}$" in script.replace("${", "$")


def test_a_search_that_goes_on_composes_its_trials_anew() -> None:
    """See test_search: what lies in a trial's folder is written over before it starts again."""
    from sftlab.sweeps.search import Search

    assert "write_point" in Search.adopt.__code__.co_names


@pytest.mark.parametrize("name", ["multirun.yaml", "overrides.yaml"])
def test_overrides_that_lie_in_a_folder_look_nothing_up(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DEMO_TOKEN", "abcXYZ0123")
    folder = tmp_path / "s"
    (folder / "0").mkdir(parents=True)
    (folder / "0/summary.json").write_text('{"status": "failed"}')
    override = "name=${oc.env:DEMO_TOKEN}"
    if name == "overrides.yaml":
        (folder / "0" / name).write_text(yaml.safe_dump([override]))
    else:
        (folder / name).write_text(yaml.safe_dump({"hydra": {"overrides": {"task": [override]}}}))
    with pytest.raises(SystemExit):
        show(monkeypatch, f"dir={folder}", "retry=failed", "report=false")
    said = capsys.readouterr()
    assert "would be looked up on this machine" in said.err and "abcXYZ0123" not in said.err + said.out


def test_a_multirun_yaml_that_is_none_is_said(tmp_path: Path) -> None:
    (tmp_path / "multirun.yaml").write_text("hydra: [1]\n")
    with pytest.raises(ValueError, match="not what Hydra leaves"):
        planned(tmp_path)


@pytest.mark.parametrize("value", ["/tmp/x", "../../x", "a/b", "..", "-x", ""])
def test_an_evaluation_s_folder_is_named_by_a_name(value: str, run: Path) -> None:
    (run / "overrides.yaml").write_text(yaml.safe_dump([f"data={value}"]))
    assert own_name(resolve(str(run))) == "validation"
    (run / "overrides.yaml").write_text(yaml.safe_dump(["data=squad"]))
    assert own_name(resolve(str(run))) == "squad"


WINNERS = {
    "a class": "optim:\n  _target_: os.mkdir\n",
    "Hydra's callbacks": "hydra:\n  callbacks:\n    x: {_target_: os.mkdir, path: it_ran}\n",
    "the environment": "name: ${oc.env:DEMO_TOKEN}\n",
    "the environment, by a name in the config": "data: {subset: oc.env}\nname: ${${data.subset}:DEMO_TOKEN}\n",
    "the environment, by a part of a name": "data: {subset: env}\nname: ${oc.${data.subset}:DEMO_TOKEN}\n",
    "commands of jobs": "launcher: {python: touch it_ran}\n",
    "a launcher": "defaults:\n- override /launcher: local\n",
    "a directory": "run_dir: elsewhere\n",
    "a checkpoint": "resume: elsewhere\n",
    "an option of the folder": "defaults:\n- override /data: theirs\n",
    "a group out of the folder": "defaults:\n- /0/config@_global_: x\n",
    "remote code": "model: {trust_remote_code: true, name_or_path: a/b}\n",
    "no tree": "- 1\n",
}


@pytest.mark.parametrize("how", WINNERS)
def test_a_winner_is_composed_of_options_and_values(
    how: str, tmp_path: Path, refused: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEMO_TOKEN", "abcXYZ0123")
    (tmp_path / "s/experiment").mkdir(parents=True)
    (tmp_path / "s/experiment/best.yaml").write_text(f"# @package _global_\n{WINNERS[how]}")
    error = refused("train", "--config-dir", "s", "experiment=best")
    assert "best.yaml" in error and "abcXYZ0123" not in error and not (tmp_path / "it_ran").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]


def test_of_a_sweep_s_folder_only_the_winner_is_taken(tmp_path: Path, refused: Typed) -> None:
    (tmp_path / "s/data").mkdir(parents=True)
    (tmp_path / "s/sweep.json").write_text("{}")
    (tmp_path / "s/data/theirs.yaml").write_text("_target_: os.mkdir\n")
    assert "only experiment=best may be used" in refused("train", f"--config-dir={tmp_path / 's'}", "data=theirs")


# ---- copies of the code, and pickled jobs ------------------------------------------------------------------


def tamper(copy: Path, how: str, marker: Path) -> None:
    code = f"open({str(marker)!r}, 'w').close()\n"
    if how == "a changed file":
        file = copy / "sftlab/launchers/job.py"
        file.write_text(code + file.read_text())
    elif how == "a file too many":
        (copy / "sitecustomize.py").write_text(code)
    elif how == "a link":
        (copy / "torch").symlink_to(marker.parent)
    elif how == "a whole copy":
        shutil.rmtree(copy / "sftlab")
        (copy / "sftlab").mkdir()
        (copy / "sftlab/__init__.py").write_text(code)
    elif how == "a cache of Python's":
        (copy / "sftlab/launchers/__pycache__").mkdir()
        (copy / "sftlab/launchers/__pycache__/job.cpython-311.pyc").write_bytes(b"code")


@pytest.mark.parametrize("how", ["a changed file", "a file too many", "a link", "a whole copy", "a cache of Python's"])
def test_a_copy_of_the_code_is_reused_for_what_it_is_not_for_what_it_says(how: str, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    first = snapshot(folder, [], tmp_path)
    assert snapshot(folder, [], tmp_path) == first
    tamper(first, how, tmp_path / "it_ran")
    found = snapshot(folder, [], tmp_path)
    if how == "a cache of Python's":
        assert found == first and not list(first.rglob("__pycache__"))
    else:
        assert found.name == "code.2" and not (found / "sitecustomize.py").exists()
        assert "it_ran" not in (found / "sftlab/launchers/job.py").read_text()


def test_pickled_jobs_lie_where_only_their_owner_looks(tmp_path: Path) -> None:
    points = Points(tmp_path, "x", "", tmp_path / "code", {})
    (tmp_path / ".submitit").mkdir(mode=0o777)
    assert points.job_folder().stat().st_mode & 0o777 == 0o700
    (tmp_path / ".submitit").rmdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / ".submitit").symlink_to(tmp_path / "mine")
    with pytest.raises(LinkRefused):
        points.job_folder()


def test_a_job_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers.os, "getuid", lambda: 12345)
    with pytest.raises(LaunchError, match="belongs to another user"):
        Points(tmp_path, "x", "", tmp_path / "code", {}).job_folder()


@pytest.mark.parametrize("exposed", ["the root", "the job's folder", "the pickle", "a link", "of another user"])
def test_a_job_that_others_may_write_is_not_loaded(
    exposed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, inner = tmp_path / ".submitit", tmp_path / ".submitit/12"
    inner.mkdir(parents=True)
    pickled = inner / "12_submitted.pkl"
    pickled.write_bytes(b"")
    for path, mode in ((root, 0o755), (inner, 0o755), (pickled, 0o644)):
        path.chmod(mode)
    refuse_exposed(root, inner, pickled)
    if exposed == "a link":
        pickled.rename(tmp_path / "elsewhere")
        pickled.symlink_to(tmp_path / "elsewhere")
    elif exposed == "of another user":
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    else:
        path = {"the root": root, "the job's folder": inner, "the pickle": pickled}[exposed]
        path.chmod(path.stat().st_mode | 0o020)
    with pytest.raises(Exposed, match="is not run"):
        refuse_exposed(root, inner, pickled)
    if exposed in ("the job's folder", "the pickle"):
        root.chmod(0o700)  # nobody else gets there
        refuse_exposed(root, inner, pickled)


@pytest.mark.parametrize("name", ["partition", "account", "qos", "constraint"])
def test_an_option_of_slurm_is_one_line(name: str) -> None:
    with pytest.raises(ValueError, match=rf"launcher\.{name}='a\\ntouch x'"):
        Slurm(**{k: v for k, v in slurm(**{name: "a\ntouch x"}).items() if k != "_target_"})
    with pytest.raises(ValueError, match=r"launcher\.sbatch\.mail"):
        Slurm(**{k: v for k, v in slurm(sbatch={"mail": "a\ntouch x"}).items() if k != "_target_"})
