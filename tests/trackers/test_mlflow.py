"""MLflow's own server on loopback, and its own client on what the tracker left there."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sftlab.trackers.mlflow import mlflow
from tests.support import free_port
from tests.trackers.trial import NAMES, attempt, loss, stopped_and_resumed

pytestmark = pytest.mark.filterwarnings("ignore")  # of MLflow's own


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of one worker."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/db", "--artifacts-destination", str(folder / "files")]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=log,
            stderr=log,
            env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )
    deadline_s = time.monotonic() + 240
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
            break
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline_s, (folder / "log").read_text()
            time.sleep(0.3)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(30)


def only_run(uri: str, project: str) -> tuple[Any, Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(project)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return client, run


def test_a_run_on_a_server_and_its_resume(server: str, tmp_path: Path) -> None:
    """The resume goes on in the same run; a step that is done again has its newest value."""
    make = partial(mlflow, project="teas", uri=server, tags=["green"])
    assert stopped_and_resumed(make, tmp_path / "run") == []
    client, run = only_run(server, "teas")
    assert (run.info.run_name, run.info.status) == ("sft/today/3", "FINISHED")
    assert run.data.tags.items() >= {"green": "true", "tiny-model": "true", "group": "sft/today"}.items()
    assert run.data.params == {"model.name_or_path": "org/tiny-model", "optim.lr": "0.5", "seed": "0"}
    assert run.data.metrics.keys() == NAMES
    curve = {m.step: m.value for m in client.get_metric_history(run.info.run_id, "train/loss")}
    assert curve == {step: loss(step) for step in range(1, 6)}
    assert {m.step for m in client.get_metric_history(run.info.run_id, "val/loss")} == {0, 5}
    answers = [f.path for f in client.list_artifacts(run.info.run_id, "val/answers")]
    assert answers == ["val/answers/step_00000000.json", "val/answers/step_00000005.json"]
    table = json.loads(Path(client.download_artifacts(run.info.run_id, answers[0], str(tmp_path))).read_text())
    assert [row[table["columns"].index("answer")] for row in table["data"]] == ["tea"]


def test_a_server_that_is_away_leaves_the_run_in_its_own_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    make = partial(mlflow, project="teas", uri=f"http://127.0.0.1:{free_port()}", offline="auto")
    said = attempt(make, tmp_path / "run", 0, 2, "failed")
    own = f"sqlite:///{tmp_path}/run/mlflow.db"
    assert said == [f"tracker mlflow: offline; see it with mlflow ui --backend-store-uri {own}"]
    _, run = only_run(own, "teas")
    assert run.info.status == "FAILED" and run.data.metrics["train/loss"] == loss(2)


def test_an_offline_run_does_not_ask_a_server_that_answers(server: str, tmp_path: Path) -> None:
    make = partial(mlflow, project="coffees", uri=server, offline=True)
    (said,) = attempt(make, tmp_path / "run", 0, 2, "stopped")
    own = f"sqlite:///{tmp_path}/run/mlflow.db"
    assert said.endswith(own) and only_run(own, "coffees")[1].data.metrics["train/loss"] == loss(2)
    from mlflow import MlflowClient

    assert MlflowClient(tracking_uri=server).get_experiment_by_name("coffees") is None
