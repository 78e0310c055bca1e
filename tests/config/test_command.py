"""What every command shares, with a task that only notes what it was given: quoting, sweeps, errors, exit codes."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from sftlab.assets import locate
from sftlab.config import completion, errors, overrides, start, unknown
from sftlab.config.binding import check_node
from tests.support import free_port

Given = Callable[..., list[dict[str, Any]]]
TOKEN = "hf_" + "aB3" * 12


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Given:
    """Type a command in an empty folder; return the config of each time that its task was called."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setenv(start.START_TIME, "before")

    def run(*arguments: str, error: BaseException | None = None, config_name: str = "train") -> list[dict[str, Any]]:
        configs: list[dict[str, Any]] = []

        def task(cfg: Any) -> float:
            configs.append(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
            if error is not None and len(configs) == 1:
                raise error
            return 0.0

        monkeypatch.setattr(sys, "argv", ["sftlab-train", *arguments])
        try:
            start.main(task, config_name)
        except SystemExit as stop:
            configs.append({"exit": stop.code})
        return configs

    return run


@pytest.mark.parametrize("path", ["a,b.jsonl", "a [1] {x: y}.jsonl", "it's.jsonl", "end\\"])
def test_a_path_of_one_run_arrives_as_it_was_typed(path: str, given: Given) -> None:
    for more in ((), ("launcher=none",), ("sweeper=grid",)):
        (config,) = given(f"data.path={path}", *more)
        assert config["data"]["path"] == path


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_paths_with_a_comma_are_a_sweep_where_there_is_no_such_file(flag: str, given: Given, tmp_path: Path) -> None:
    (tmp_path / "a,b").mkdir()
    configs = given(flag, "data.path=one.jsonl,two.jsonl", "data.val_path=a,b")
    assert [c["data"]["path"] for c in configs] == ["one.jsonl", "two.jsonl"]
    assert [c["data"]["val_path"] for c in configs] == ["a,b", "a,b"]


def test_a_launcher_makes_a_sweep_without_a_flag(given: Given) -> None:
    """Hydra's own launcher stands in for ours here: what counts is that two paths are two points."""
    (refused,) = given("launcher=local", "data.path=one.jsonl,two.jsonl", "run_dir=x")
    assert refused == {"exit": 1}
    configs = given("launcher=local", "hydra/launcher=basic", "data.path=one.jsonl,two.jsonl")
    assert [c["data"]["path"] for c in configs] == ["one.jsonl", "two.jsonl"]


def test_a_home_that_exists_is_one_path_in_a_sweep_too(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a,b.jsonl").touch()
    configs = given("-m", "data.path=~/a,b.jsonl", "seed=1,2")
    assert [(c["data"]["path"], c["seed"]) for c in configs] == [("~/a,b.jsonl", 1), ("~/a,b.jsonl", 2)]


@pytest.mark.parametrize(
    "kept",
    ["data.path=${oc.env:HOME}/x", "data.path=null", "data.path=", "data.path='a b'", 'data.path="a b"', "seed=1"],
)
def test_what_hydra_has_a_meaning_for_is_left_to_it(kept: str) -> None:
    assert overrides.quote(kept, multirun=False) == kept


def test_backslashes_before_a_quote_and_at_the_end_survive(given: Given) -> None:
    for text in (r"a\'b", r"a\\'b", "a\\\\"):
        (config,) = given(f"data.path={text}")
        assert config["data"]["path"] == text


# Errors and exit codes


@pytest.mark.parametrize("kind", [ValueError, OSError, FileNotFoundError, ZeroDivisionError, MemoryError])
def test_an_error_that_teaches_is_shown_alone(
    kind: type[Exception], given: Given, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, exit = given(error=kind("say this"))
    assert exit == {"exit": 1} and capfd.readouterr().err == "error: say this\n"
    monkeypatch.setenv("SFTLAB_TRACEBACK", "1")
    given(error=kind("say this"))
    error = capfd.readouterr().err
    assert "Traceback" in error and "say this" in error and "in task" in error


def test_any_other_error_has_its_traceback(given: Given, capfd: pytest.CaptureFixture[str]) -> None:
    _, exit = given(error=RuntimeError("a fault of ours"))
    error = capfd.readouterr().err
    assert exit == {"exit": 1} and error.startswith("error: Traceback") and error.endswith("a fault of ours\n")


def test_an_interrupt_exits_with_130(given: Given, capfd: pytest.CaptureFixture[str]) -> None:
    _, exit = given(error=KeyboardInterrupt())
    assert exit == {"exit": 130} and capfd.readouterr().err == "error: interrupted\n"


def test_a_point_that_fails_keeps_the_others_of_a_sweep_running(
    given: Given, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second, exit = given("-m", "seed=1,2", error=ValueError("the first fails"))
    assert (first["seed"], second["seed"], exit) == (1, 2, {"exit": 1})
    assert "the first fails" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("ranks", "rank", "said"), [(None, "2", "error: "), ("1", "0", "error: "), ("4", "2", "error on rank 2: ")]
)
def test_an_error_names_its_rank_where_there_are_several_and_holds_no_secret(
    ranks: str | None, rank: str, said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if ranks:
        monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.setenv("RANK", rank)
    errors.complain(f"401 with {TOKEN}")
    assert capfd.readouterr().err == f"{said}401 with [secret]\n"


def test_a_key_without_a_default_is_named(given: Given, capfd: pytest.CaptureFixture[str]) -> None:
    from omegaconf.errors import MissingMandatoryValue

    error = MissingMandatoryValue("missing")
    error.full_key = "model.name_or_path"
    said = "model.name_or_path has no default: give one, model.name_or_path=..."
    assert errors.explain(error, "train") == said


def test_errors_of_composition_are_one_line(given: Given, capfd: pytest.CaptureFixture[str]) -> None:
    for argument in ("name=../x", "optim.lr=[1", "seed=${nothing}"):
        assert given(argument)[-1] == {"exit": 1}
        error = capfd.readouterr().err
        assert error.startswith("error: ") and "full_key" not in error and "Traceback" not in error
        assert "raised while resolving" not in error


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("launcher.nodes=2", "it belongs to launcher=slurm and launcher=slurm_a100"),
        ("schedule.decay_ratio=0.1", "it belongs to schedule=wsd"),
        ("sweeper.num_trials=3", "it belongs to sweeper=optuna"),
        ("data.format.supervise=last", "it belongs to data=chat and data=template"),
        ("data.weights={a:1}", "it belongs to data=mixture"),
        ("schedule.decay_rato=0.1", "did you mean schedule.decay_ratio?"),
        ("sweeper.n_trial=3", "did you mean sweeper.num_trials?"),
    ],
)
def test_a_key_of_another_option_says_whose_it_is(
    argument: str, said: str, given: Given, capfd: pytest.CaptureFixture[str]
) -> None:
    assert given(argument) == [{"exit": 1}]
    error = capfd.readouterr().err.strip()
    assert error.startswith(f"error: {argument.partition('=')[0]}: ") and said in error
    assert error.endswith(said) or "did you mean" in said


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("trainer.max_step", "did you mean trainer.max_steps? "),
        ("max_step", "did you mean trainer.max_steps? "),
        ("betas", "did you mean optim.betas? "),
        ("nothing_like_it", ""),
    ],
)
def test_the_nearest_key_is_near(name: str, found: str) -> None:
    assert unknown.nearest(name, ["seed", "trainer.max_steps", "optim.betas", "optim.lr"]) == found


def test_of_two_keys_with_one_name_the_first_is_meant() -> None:
    assert unknown.nearest("path", ["data.path", "model.path"]) == "did you mean data.path? "
    assert unknown.nearest("a.b.c.d.e.lenght", ["x.length", "y.length"]) == "did you mean x.length? "


def test_a_constructor_that_takes_anything_binds_anything() -> None:
    check_node("model", {"_target_": "tests.support.tiny_llama", "hidden_size": 16})
    with pytest.raises(ValueError, match="takes no such key"):
        check_node("model", {"_target_": "tests.support.free_port", "hidden_size": 16})


# A sweep's points and the time of the start


def test_a_sweeps_points_keep_to_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides.refuse_point_keys(["name=one", "seed=1,2", "data.path=a,b"])
    for argument in ("name=one,two", "run_dir=here"):
        with pytest.raises(ValueError, match=rf"{argument.partition('=')[0]}= cannot be set in a sweep"):
            overrides.refuse_point_keys(["seed=1,2", argument])
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert (
        overrides.point_dir(tmp_path / "work" / "sweeps" / "0") == overrides.point_dir(Path("sweeps/0")) == "sweeps/0"
    )
    assert overrides.point_dir(tmp_path / "elsewhere" / "0") == str(tmp_path / "elsewhere" / "0")


def test_each_start_has_its_own_time(given: Given) -> None:
    (first,), (second,) = given(), given("name=mine")
    assert "before" not in first["run_dir"] and first["run_dir"].startswith("runs/sft/20")
    assert second["run_dir"].startswith("runs/mine/20") and first["run_dir"][9:] != second["run_dir"][10:]


def test_all_ranks_of_a_start_have_rank_0s_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    port = free_port()
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    for key, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(port))):
        monkeypatch.setenv(key, value)
    monkeypatch.setenv(start.START_TIME, "before")
    stamps = {}
    for restart in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restart)
        for rank in ("0", "1"):
            monkeypatch.setenv("RANK", rank)
            start.agree_on_start_time(multirun=False)
            stamps[restart, rank] = os.environ[start.START_TIME]
    assert stamps["0", "0"] == stamps["0", "1"] != stamps["1", "0"] == stamps["1", "1"]
    with pytest.raises(ValueError, match="under torchrun or srun would run in every process"):
        start.agree_on_start_time(multirun=True)
    del store


# Completion


@pytest.mark.parametrize(
    ("arguments", "as_module", "ours"),
    [
        (["-sc", "install=bash"], True, True),
        (["--shell-completion", "install=bash"], True, True),
        (["-sc", "install=bash"], False, False),
        (["-sc", "query=bash"], True, False),
        (["install=bash"], True, False),
    ],
)
def test_only_a_module_installs_our_completion(
    arguments: list[str], as_module: bool, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COMP_LINE", raising=False)
    assert (completion.prepare(arguments, as_module) == completion.BASH) == ours
    assert "COMP_LINE" not in os.environ


@pytest.mark.parametrize(
    ("line", "read"),
    [
        ("python -m sftlab.evaluate lim", "python evaluate.py lim"),
        ("  venv/bin/python3.11  -m  sftlab.train x", "python train.py x"),
        ("python -m sftlab train x", "python train.py x"),
        ("sftlab preview x", "python preview.py x"),
        ("/opt/bin/sftlab train ", "python train.py "),
        ("python -m other.train x", "python -m other.train x"),
        ("sftlab-train x", "sftlab-train x"),
    ],
)
def test_a_line_to_complete_is_made_readable_for_hydra(line: str, read: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    assert completion.prepare(["-sc", "query=bash"], as_module=True) is None
    assert os.environ["COMP_LINE"] == read


# What ships with the package


def test_an_asset_is_found_and_a_home_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("asset://demo/model").endswith("sftlab/assets/demo/model")
    assert Path(locate("asset://demo/model"), "config.json").is_file()
    assert locate("~/model") == str(tmp_path / "model")
    assert (locate("somebody/model"), locate("some~/x")) == ("somebody/model", "some~/x")
