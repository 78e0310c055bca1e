"""The estimate beside what is measured and worked out by hand; the command; the look before points are queued."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from experiments.estimate.measure import SETTINGS, TINY, composed, estimated, measured
from sftlab.estimating import submission
from sftlab.estimating.changes import changes, smallest_change
from sftlab.estimating.devices import DEVICES, GIB
from sftlab.estimating.estimate import Estimate, estimate_run
from sftlab.estimating.rehearsal import full_rows, rehearse
from sftlab.launchers.launcher import LaunchError
from tests.support import command, run_distributed

BIG = ("model=llama3_1_70b", "data=squad", "launcher.nodes=8", "launcher.processes_per_node=8")


@pytest.mark.parametrize("name", [n for n in SETTINGS if n not in ("long rows", "selective")])
def test_within_a_tenth_of_the_measured_peak(name: str, tmp_path: Path) -> None:
    ranks, overrides = SETTINGS[name]
    found = max(run_distributed(measured, ranks, [*TINY, *overrides], str(tmp_path / "run")))
    assert estimated([*TINY, *overrides], ranks)["peak_bytes"] == pytest.approx(found, rel=0.10)


def run_of(*overrides: str) -> Estimate:
    config = composed("estimate", overrides)
    return estimate_run(config, config.pop("estimate"))


def test_seventy_billion_parameters_on_64_ranks_by_hand() -> None:
    found = run_of(*BIG, "estimate.price_per_hour=2")
    numbers = 70_553_706_496
    assert found.rehearsal.num_parameters == found.rehearsal.num_trained == numbers
    share = 4 * numbers / 64
    assert found.parts["parameters"] == pytest.approx(share, rel=0.002)
    assert found.parts["optimiser"] == pytest.approx(2 * share, rel=0.002)
    assert found.rehearsal.phases["update"]["gradients"] == pytest.approx(share, rel=0.002)
    assert found.checkpoint_bytes == pytest.approx(12 * numbers, rel=0.002)
    assert found.steps == math.ceil(87_599 / 32)
    # 6 operations per parameter of a matrix and token, the head at predictions alone
    body, head = numbers - 2 * 128256 * 8192, 128256 * 8192
    tokens = 32 * 55.3
    assert found.step_flops == pytest.approx(6 * (body * tokens + head * 32 * 5.4), rel=0.02)
    assert found.steps is not None and found.step_flops is not None and found.hours is not None
    assert found.hours == pytest.approx(found.steps * found.step_flops / (0.35 * 989e12 * 64) / 3600)
    assert found.price == pytest.approx(found.hours * 64 * 2)
    json.dumps(found.numbers(), allow_nan=False)


def test_blocks_that_are_not_rehearsed_are_what_they_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    from sftlab.config.binding import check
    from sftlab.estimating.devices import device_named
    from sftlab.estimating.estimate import shape_of, stage_of

    deep = [*TINY, "model.architecture.num_hidden_layers=8", "model.architecture.vocab_size=512"]
    for more in ((), ("trainer.activation_checkpointing=full",), ("model.architecture.tie_word_embeddings=false",)):
        config = composed("estimate", [*deep, *more])
        config.pop("estimate")
        parts = check(config)
        for ranks, rows in ((1, 1), (4, 8)):
            device = device_named("h100")
            stage = stage_of(parts, shape_of(parts["model"], device), ranks, device, "bfloat16")
            batch = full_rows(1, rows * 128, 64)
            found, whole = rehearse(stage, batch, 2), rehearse(stage, batch, 2, whole=True)
            assert found.phase == whole.phase and found.peak == pytest.approx(whole.peak, rel=0.01)
            assert found.num_parameters == whole.num_parameters and found.state_bytes == pytest.approx(
                whole.state_bytes
            )


def test_a_run_fits_or_the_smallest_change_is_named() -> None:
    small = ("model=llama3_2_1b", "data=squad")
    assert run_of(*small, "estimate.device=h100").fits is True
    given = (*small, "estimate.device=rtx4090", "trainer.batch_size=256", "trainer.rows_per_microbatch=8")
    config = composed("estimate", given)
    own = config.pop("estimate")
    assert estimate_run(config, own).fits is False
    tried: list[str] = []
    found = smallest_change(config, lambda more: composed("estimate", [*given, *more]), tried.append)
    assert found is not None and found[1].fits and tried[-1] == " ".join(found[0])
    assert run_of(*given, *found[0]).peak == found[1].peak
    done = composed("estimate", (*given, "trainer.activation_checkpointing=full"))
    assert all("trainer.activation_checkpointing=full" not in change for change in changes(done))


def test_offloading_and_accumulation_show_in_the_parts() -> None:
    base = ("model=llama3_1_8b", "data=squad", "trainer.rows_per_microbatch=1", "data.row_length=1024")
    plain, offloaded = run_of(*base), run_of(*base, "parallel.cpu_offload=true")
    kept = sum(plain.parts[k] for k in ("parameters", "gradients", "optimiser"))
    assert kept > 12 * 8e9 and offloaded.peak == pytest.approx(plain.peak - kept)
    assert offloaded.host_bytes > plain.host_bytes + 12 * 8e9


def test_data_that_is_not_read_is_what_is_said_of_it() -> None:
    given = [
        *TINY,
        "estimate.read_data=false",
        "estimate.num_examples=1000",
        "estimate.tokens_per_example=100",
        "estimate.shared_tokens_per_example=50",
        "estimate.targets_per_example=10",
        "trainer.batch_size=64",
    ]
    found = run_of(*given, "estimate.mfu=0.5")
    a = found.amounts
    assert (a.num_examples, a.tokens, a.effective_tokens, a.predictions) == (1000, 3200, 6400, 640)
    assert found.steps == 16 and a.batch.tokens.numel() == 3200 and len(a.batch.at) == 640
    assert "50.0 after sharing" in a.known_from and "read_data=false" in a.known_from
    packed = run_of(*given, "data.layout=packed")
    assert packed.amounts.tokens == 6400 and packed.hours is not None and found.hours is not None
    assert found.hours < 0.7 * packed.hours  # at an MFU of 0.35, and of twice the tokens
    unknown = run_of(*TINY, "estimate.read_data=false", "trainer.max_steps=7")
    assert unknown.steps == 7 and unknown.step_flops is unknown.hours is unknown.price is None and unknown.peak > 0
    with pytest.raises(Exception, match="no/such"):
        run_of(*TINY, "data.path=no/such.jsonl", "estimate.read_data=true")


def test_what_is_asked_for_and_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"estimate.device=h101: expected one of .*h100"):
        run_of("estimate.device=h101")
    with pytest.raises(ValueError, match=r"trainer.btch_size"):
        run_of("+trainer.btch_size=3")
    assert all(d.usable_gib is None or 0 < d.usable_gib < (d.memory_gib or 0) for d in DEVICES.values())


def test_the_command_needs_no_network_and_queues_nothing(tmp_path: Path) -> None:
    done = command(
        "estimate",
        *TINY,
        "launcher=slurm",
        "launcher.processes_per_node=2",
        "estimate.output=out.json",
        "estimate.changes=false",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "fits: " in done.stdout and "on 2 x h100" in done.stdout and "optimiser" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["ranks"] == 2 and found["fits"] is True and sum(found["parts_bytes"].values()) == found["peak_bytes"]
    assert found["data"] == "read: 160 examples" and found["steps"] == 5


def test_points_that_do_not_fit_are_named_before_anything_is_queued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sftlab.common import run_directory
    from sftlab.launchers.launcher import Points, make_launcher

    run_dirs = {}
    for num, rate in enumerate(("1e-5", "2e-5")):
        config = composed("train", [*TINY, "launcher=slurm", f"optim.lr={rate}"])
        run_dirs[num] = tmp_path / str(num)
        run_dirs[num].mkdir()
        run_directory.put(run_dirs[num] / "config.yaml", config)
    points = Points(tmp_path, "sft", str(tmp_path), tmp_path, run_dirs)
    estimates: list[Any] = []
    original = submission.estimate_run

    def counted(*given: Any) -> Estimate:
        estimates.append(given)
        return original(*given)

    monkeypatch.setattr(submission, "estimate_run", counted)
    options = composed("train", ["launcher=slurm"])["launcher"]

    def look(**changed: Any) -> str:
        make_launcher(options | changed).look_at_memory(points)  # type: ignore[attr-defined]
        return capsys.readouterr().err

    assert look() == look(device="h100", check_memory="off") == look(device="h100") == ""
    assert len(estimates) == 1  # the points differ in nothing that takes memory
    tiny = DEVICES["h100"].__class__("h100", 3.0 + 1 / 1024, 989e12)
    monkeypatch.setitem(DEVICES, "h100", tiny)
    said = look(device="h100")
    assert said.count("point ") == 2 and "GiB per rank" in said and "sftlab.estimate" in said
    with pytest.raises(LaunchError, match=r"nothing is queued.*\n.*point 0"):
        look(device="h100", check_memory="error")
    with pytest.raises(ValueError, match=r"launcher.device=h101: expected one of"):
        make_launcher(options | {"device": "h101"})
    with pytest.raises(ValueError, match=r"launcher.check_memory=maybe: expected warn, error, off"):
        make_launcher(options | {"check_memory": "maybe"})
    assert tiny.usable_gib is not None and tiny.usable_gib * GIB < 2**21
