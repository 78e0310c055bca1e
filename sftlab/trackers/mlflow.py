"""MLflow: a run of an experiment, on a server, in a database or in a folder.

Without a server's address it is what `MLFLOW_TRACKING_URI` says, else MLflow's own default, a database in the working
directory. If a server cannot be reached, the run goes into a database in its own directory.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from sftlab.common.tracker import About, Answer, Tracker
from sftlab.trackers.service import COLUMNS, all_tags, check_offline, flat, is_offline, recall, remember, row

MOST_PARAMS = 100  # in one call
MOST_CHARS = 6000  # of a value
ENDS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MLflow(Tracker):
    """A run of MLflow. It begins with `cut`, which says whether the run is new."""

    def __init__(self, about: About, project: str, uri: str | None, tags: Sequence[str], offline: bool | str) -> None:
        self.about = about
        self.project = project
        self.uri = uri
        self.tags = all_tags(about, tags)
        self.offline = offline
        self.client: Any = None
        self.run_id = ""

    def cut(self, step: int) -> None:
        """Begin, or resume, the MLflow run."""
        import mlflow

        known = recall(self.about.run_dir, "mlflow", step)
        uri = str(known.get("uri") or self.uri or mlflow.get_tracking_uri())
        own = f"sqlite:///{(self.about.run_dir / 'mlflow.db').absolute()}"
        if self.offline is True or (uri.startswith("http") and is_offline(self.offline, uri)):
            self.about.say(f"tracker mlflow: offline; see it with mlflow ui --backend-store-uri {own}")
            known, uri = (known, own) if known.get("uri") == own else ({}, own)
        self.client = mlflow.MlflowClient(tracking_uri=uri)
        self.run_id = str(known.get("run_id") or self.begin(own == uri))
        self.client.update_run(self.run_id, status="RUNNING")
        remember(self.about.run_dir, "mlflow", {"run_id": self.run_id, "uri": uri})

    def begin(self, inside: bool) -> str:
        """Return the id of a new run with its config. `inside`: its files lie in the run's directory too."""
        found = self.client.get_experiment_by_name(self.project)
        folder = (self.about.run_dir / "mlflow").absolute().as_uri() if inside else None
        experiment = found.experiment_id if found else self.client.create_experiment(self.project, folder)
        group = {"group": self.about.group} if self.about.group else {}
        tags = {**dict.fromkeys(self.tags, "true"), **group, "run_dir": str(self.about.run_dir)}
        run_id = str(self.client.create_run(experiment, run_name=self.about.name, tags=tags).info.run_id)
        from mlflow.entities import Param

        params = [Param(key, str(value)[:MOST_CHARS]) for key, value in flat(self.about.config).items()]
        for i in range(0, len(params), MOST_PARAMS):
            self.client.log_batch(run_id, params=params[i : i + MOST_PARAMS])
        return run_id

    def write_numbers(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        """Log them in one call."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        numbers = {**values, "time_s": time_s}
        self.client.log_batch(self.run_id, metrics=[Metric(name, v, now_ms, step) for name, v in numbers.items()])

    def write_answers(self, step: int, answers: Sequence[Answer]) -> None:
        """Log them as a table of this step."""
        if answers:
            columns = zip(*map(row, answers), strict=True)
            data = {name: list(column) for name, column in zip(COLUMNS, columns, strict=True)}
            self.client.log_table(self.run_id, data, f"val/answers/step_{step:08d}.json")

    def close(self, status: str) -> None:
        """End the MLflow run."""
        if self.run_id:
            self.client.set_terminated(self.run_id, ENDS.get(status, "FAILED"))


def mlflow(
    about: About,
    project: str = "sftlab",
    uri: str | None = None,
    tags: Sequence[str] = (),
    offline: bool | str = "auto",
) -> Tracker:
    """Return a tracker of MLflow; `project` is the experiment's name."""
    check_offline("mlflow", offline)
    return MLflow(about, project, uri, tags, offline)
