"""The benchmark command: what it measures, on which data, and what it says of a baseline and of wrong settings."""

import json
from pathlib import Path
from typing import Any

import pytest

from sftlab.benchmarking.results import SCHEMA
from sftlab.data.forest import LAYOUTS
from tests.commands import Typed, run_here
from tests.support import REPO

SHORT = ("warm_up=2", "windows=3", "steps_per_window=2", "tracker=none")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """The folder of a benchmark of three layouts on generated questions: deep/out.json, profiles/all.txt, shown.txt."""
    folder = tmp_path_factory.mktemp("benchmark")
    shown = run_here(
        "benchmark",
        "case=squad",
        *SHORT,
        "model=hf",
        f"model.name_or_path={model_folder}",
        "layouts=[tree,packed,padded]",
        "scale=0.2",
        "trainer.batch_size=8",
        f"output={folder}/deep/out.json",
        f"profile={folder}/profiles/all.txt",
    )
    (folder / "shown.txt").write_text(shown)
    return folder


@pytest.fixture
def found(measured: Path) -> dict[str, Any]:
    return dict(json.loads((measured / "deep/out.json").read_text()))


def test_each_layout_is_measured_on_the_same_examples(found: dict[str, Any]) -> None:
    layouts = found["layouts"]
    assert list(layouts) == list(LAYOUTS) and found["schema"] == SCHEMA
    for values in layouts.values():
        assert len(values["losses"]) == 2 + 3 * 2
        assert values["losses"] == pytest.approx(layouts["padded"]["losses"], rel=1e-5)
        assert len(values["examples_per_s_windows"]) == 3 and values["examples_per_step"] == 8
        assert values["examples_per_s"] == sorted(values["examples_per_s_windows"])[1]
        per_example = layouts["tree"]["tokens_per_example"]
        assert values["tokens_per_example"] == per_example and 30 < per_example < 90
        through = values["shared_tokens_per_example"] / (1 - values["padding"])
        assert values["tokens_per_s"] / values["examples_per_s"] == pytest.approx(through, rel=0.3)
        assert values["step_s_median"] <= values["step_s_max"] and values["first_step_s"] > 0
        assert values["peak_gib"] > 0.05 and values["mfu"] is None  # no data sheet names this processor
        assert values["of_matrix_rate"] == values["flops_per_s"] / values["matrix_flops_per_s"] > 0
        shares = dict(values["shares"])
        assert 0 <= shares.pop("communication") <= 1 and sum(shares.values()) == pytest.approx(1)
        assert set(shares) == {"data", "forward", "backward", "optimiser"} and min(shares.values()) >= 0
        assert shares["backward"] > shares["data"]
    assert layouts["tree"]["shared_tokens_per_example"] < 0.7 * per_example
    assert layouts["packed"]["shared_tokens_per_example"] == per_example
    assert layouts["padded"]["padding"] > layouts["packed"]["padding"]


def test_the_table_and_the_profile_have_every_layout(measured: Path, found: dict[str, Any]) -> None:
    shown = (measured / "shown.txt").read_text()
    heading = next(line for line in shown.splitlines() if line.split() == ["tree", "packed", "padded"])
    assert heading
    rate = next(line for line in shown.splitlines() if line.startswith("examples/s"))
    assert rate.split()[2:] == [f"{v['examples_per_s']:,.1f}" for v in found["layouts"].values()]
    for part in ("data", "forward", "backward", "optimiser", "communication"):
        assert f"share of {part} " in shown
    profile = (measured / "profiles" / "all.txt").read_text().splitlines()
    assert [line for line in profile if line in LAYOUTS] == list(LAYOUTS)
    assert "aten::mm" in "".join(profile)


def test_the_json_says_what_ran_and_names_no_place_of_this_machine(measured: Path, found: dict[str, Any]) -> None:
    assert found["case"] == "squad" and found["data"] == "generated" and found["dtype"] == "float32"
    assert found["versions"].keys() >= {"torch", "transformers", "python", "cuda", "triton"}
    assert found["hardware"]["devices"] == 1 and "cores" in found["hardware"]["device"] and found["date"]
    assert "scale=0.2" in found["overrides"] and str(measured) not in json.dumps(found)


def test_own_data_and_a_baseline_that_is_as_fast(
    typed: Typed, tmp_path: Path, model_folder: Path, squad_files: tuple[Path, Path]
) -> None:
    given = ("data=squad", f"data.path={squad_files[0]}", "model=hf", f"model.name_or_path={model_folder}", *SHORT)
    typed("benchmark", *given, "trainer.batch_size=6", f"output={tmp_path}/first.json")
    first = json.loads((tmp_path / "first.json").read_text())
    assert first["case"] is None and first["data"] == str(squad_files[0])
    assert first["layouts"]["tree"]["examples_per_step"] == 6
    slow(tmp_path / "first.json", 0.01)
    shown = typed("benchmark", *given, "trainer.batch_size=6", "compare=" + str(tmp_path / "first.json"), "tolerance=1")
    assert "REGRESSION" not in shown and "examples_per_s" in shown and "peak_gib" in shown


def slow(path: Path, factor: float) -> None:
    """Change a baseline's rate by a factor."""
    found = json.loads(path.read_text())
    for values in found["layouts"].values():
        values["examples_per_s"] *= factor
    path.write_text(json.dumps(found))


def test_a_regression_is_marked_and_ends_with_1(
    measured: Path,
    tmp_path: Path,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import sys

    from sftlab import benchmark

    baseline = tmp_path / "base.json"
    baseline.write_text((measured / "deep/out.json").read_text())
    slow(baseline, 1000)
    arguments = ["case=squad", *SHORT, "model=hf", f"model.name_or_path={model_folder}", "scale=0.2"]
    arguments += ["trainer.batch_size=8", f"compare={baseline}", f"output={tmp_path}/now.json", "tolerance=0.9"]
    monkeypatch.setattr(sys, "argv", ["sftlab-benchmark", *arguments])
    with pytest.raises(SystemExit) as stop:
        benchmark.main()
    out, error = capfd.readouterr()
    assert stop.value.code == 1 and (tmp_path / "now.json").is_file()
    marked = [line.split()[:2] for line in out.splitlines() if "REGRESSION" in line]
    assert marked == [["tree", "examples_per_s"]]
    assert error.startswith("error: worse than ") and "tree examples_per_s" in error and "peak_gib" not in error
    assert "it was measured with" in out  # three layouts there, one here


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["case=squat"], "case=squat: expected one of squad, chat, dense, agent, or null"),
        (["layouts=[tree,packd]"], "layouts=[tree, packd]: expected a list, each one of tree, packed, padded"),
        (["layouts=[]"], "layouts=[]: expected a list of different layouts"),
        (["layouts=tree"], "layouts=tree: expected a list, each one of tree, packed, padded"),
        (["layouts=[tree,tree]"], "expected a list of different layouts"),
        (["windows=0"], "windows=0: expected a whole number of at least 1"),
        (["warm_up=half"], "warm_up=half: expected a whole number of at least 1"),
        (["scale=0"], "scale=0: expected a number above 0"),
        (["tolerance=-1"], "tolerance=-1: expected a number above 0 and of at most 1"),
        (["data.path=generated"], "add case=, one of squad, chat, dense, agent"),
        (["compare=no/such.json"], "compare=no/such.json: there is no such file"),
        (["trainer.batch_sizes=2"], "did you mean trainer.batch_size?"),
        (["window=2"], "did you mean windows?"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_built(refused: Typed, arguments: list[str], said: str) -> None:
    assert said in refused("benchmark", *arguments)


def test_a_baseline_must_be_one_of_this_case_and_device_with_these_layouts(
    refused: Typed, measured: Path, tmp_path: Path
) -> None:
    file = tmp_path / "base.json"
    whole = json.loads((measured / "deep/out.json").read_text())

    def said(change: dict[str, Any] | None, *arguments: str, text: str | None = None) -> str:
        file.write_text(text if text is not None else json.dumps(whole | (change or {})))
        little = ("scale=0.01", "trainer.batch_size=2", "data.row_length=128", *SHORT)  # where it is not refused
        return refused("benchmark", f"compare={file}", *little, *arguments)

    assert "is not JSON" in said(None, text="{")
    assert "with schema 'sftlab.benchmark/1'; it has None" in said(None, text="[1]")
    assert "it has 'other'" in said({"schema": "other"})
    assert "with case squad, and this is dense" in said({}, "case=dense")
    other = {"hardware": whole["hardware"] | {"device": "NVIDIA H100"}}
    assert "with device NVIDIA H100, and this is" in said(other, "case=squad")
    less = {"layouts": {"padded": whole["layouts"]["padded"]}}
    assert "has no layout tree; it has padded" in said(less, "case=squad")


def test_committed_results_can_be_compared_with() -> None:
    from sftlab.benchmarking.results import COMPARED, read_baseline

    files = sorted((REPO / "experiments" / "benchmarks").glob("*.json"))
    assert files
    for file in files:
        found = read_baseline(file)
        assert found["commit"] and not found["changed"] and found["hardware"]["device"]
        assert all(values[name] > 0 for values in found["layouts"].values() for name in COMPARED)
