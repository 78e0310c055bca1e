"""Weights & Biases itself writes a run offline, and its own reader reads it back."""

import json
import struct
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sftlab.trackers.service import is_offline
from sftlab.trackers.wandb import weights_and_biases
from tests.support import free_port
from tests.trackers.trial import CONFIG, attempt, loss


def records(file: Path) -> list[Any]:
    """Return the records of a .wandb file: a LevelDB log in blocks of 32 KiB behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, at, whole, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            found.append(record)
            whole = b""
    return found


def written(file: Path) -> list[Any]:
    """Return a file's records once W&B's own process has written the run's: on a busy machine that came late."""
    for _ in range(60):
        found = records(file)
        if any(r.WhichOneof("record_type") == "run" for r in found):
            break
        time.sleep(0.5)
    return found


def history(found: list[Any]) -> dict[int, dict[str, Any]]:
    rows: dict[int, dict[str, Any]] = {}
    for record in found:
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            rows.setdefault(record.history.step.num, {}).update(items)
    return rows


@pytest.mark.filterwarnings("ignore")  # of W&B's own
def test_an_offline_run_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The resume goes on under the same id, from the step after its checkpoint."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    make = partial(weights_and_biases, project="teas", entity="us", tags=["green"], offline=True)
    said = attempt(make, tmp_path / "run", 0, 3, "stopped") + attempt(make, tmp_path / "run", 2, 5, "finished")
    assert len(said) == 2 and all("wandb sync" in line for line in said)
    files = sorted((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"), key=lambda f: f.stat().st_mtime)
    first, second = map(written, files)
    runs = [next(r.run for r in part if r.WhichOneof("record_type") == "run") for part in (first, second)]
    known = json.loads((tmp_path / "run/trackers/wandb.json").read_text())
    assert {r.run_id for r in runs} == {known["id"]}
    for run in runs:
        assert (run.project, run.entity, run.display_name) == ("teas", "us", "sft/today/3")
        assert run.run_group == "sft/today" and set(run.tags) == {"green", "tiny-model"}
        config = {c.key: json.loads(c.value_json) for c in run.config.update}
        assert {k: config[k] for k in CONFIG} == CONFIG
    before, after = history(first), history(second)
    assert {s: r["train/loss"] for s, r in before.items() if s} == {s: loss(s) for s in (1, 2, 3)}
    assert {s: r["train/loss"] for s, r in after.items()} == {s: loss(s) for s in (3, 4, 5)}
    assert before[0]["val/loss"] == loss(0) and after[5]["val/loss"] == loss(5) and after[4]["time_s"] == 8.0
    assert after[5]["val/answers/_type"] == "table-file" and after[5]["val/answers/nrows"] == 1


def test_a_service_that_cannot_be_reached_is_offline_unless_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    away = f"http://127.0.0.1:{free_port()}"
    assert is_offline("auto", away) and not is_offline(False, away) and is_offline(True, "http://127.0.0.1")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    assert not is_offline("auto", away)


def test_what_offline_may_be() -> None:
    from sftlab.common.tracker import About

    with pytest.raises(ValueError, match=r"tracker.wandb.offline=maybe: expected auto, true or false"):
        weights_and_biases(About(Path(), ""), offline="maybe")
