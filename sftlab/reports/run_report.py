"""report.html of a run: what it is told to do, how far it is, its curves, data, answers and machine.

It is a tracker like any other: it gets the numbers as they come, in a thread of its own. The page is written at each
evaluation, about once a minute in between, and at the end. Writing may take 1 % of the wall time at the most: where a
page takes long to write, it is written less often.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sftlab.common.files import read_json, read_jsonl, read_text, read_yaml, write_whole
from sftlab.common.metrics import SAMPLES
from sftlab.common.run_directory import CONFIG, OVERRIDES, names, read_config, read_summary
from sftlab.common.tracker import About, Answer, Tracker
from sftlab.config.defaults import differences_from_defaults
from sftlab.reports.command import command, commit
from sftlab.reports.curves import Curves
from sftlab.reports.page import page

FACTS = "facts.json"  # how many steps, what was said at the start, the machine
EVERY_S = 60.0
SHARE = 0.01  # of the wall time that writing may take
MOST_ANSWERS = 12  # questions that are shown
MOST_EVALUATIONS = 8  # whose answers are shown: the first, the last, and some between
HERE = Path(__file__).parent


class RunReport(Tracker):
    """Keep report.html of a run."""

    def __init__(self, about: About) -> None:
        self.run_dir = about.run_dir
        self.curves = Curves()
        self.answers = Answers()
        self.written_s = -1e9
        self.cost_s = 0.0

    def write_numbers(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        """Keep them, and write the page if it is older than a minute."""
        self.curves.add(step, time_s, values)
        self._write_if(EVERY_S)

    def write_answers(self, step: int, answers: Sequence[Answer]) -> None:
        """Keep them, and write the page."""
        self.answers.add(step, answers)
        self._write_if(0.0)

    def cut(self, step: int) -> None:
        """Read what the run directory holds: metrics.jsonl ends at this step now."""
        self.curves = Curves.read(self.run_dir)
        self.answers = Answers.read(self.run_dir)

    def close(self, status: str) -> None:
        """Write the page a last time."""
        self._write(status)

    def _write_if(self, age_s: float) -> None:
        if time.monotonic() - self.written_s >= max(age_s, self.cost_s / SHARE):
            self._write("running")

    def _write(self, status: str) -> None:
        began_s = time.monotonic()
        write_page(self.run_dir, self.curves, self.answers, status)
        self.written_s = time.monotonic()
        self.cost_s = self.written_s - began_s


class Answers:
    """The answers to a few questions, by step. The questions are spread over those of the first evaluation."""

    def __init__(self) -> None:
        self.questions: dict[str, Answer] = {}
        self.by_step: dict[int, dict[str, str]] = {}

    @classmethod
    def read(cls, run_dir: Path) -> "Answers":
        """Return the answers in a run's samples.jsonl."""
        made, steps = cls(), dict[int, list[Answer]]()
        for line in read_jsonl(run_dir / SAMPLES):
            if isinstance(line.get("step"), int) and all(isinstance(line.get(k), str) for k in ("id", "answer")):
                steps.setdefault(line["step"], []).append(line)
        for step, answers in steps.items():
            made.add(step, answers)
        return made

    def add(self, step: int, answers: Sequence[Answer]) -> None:
        """Add those of an evaluation to the questions that are shown."""
        if not self.questions:
            spread = answers[:: max(1, -(-len(answers) // MOST_ANSWERS))]
            self.questions = {a["id"]: a for a in spread}
        found = {a["id"]: a["answer"] for a in answers if a["id"] in self.questions}
        if found:
            self.by_step[step] = found

    def shown(self) -> list[dict[str, Any]]:
        """Return each question with its references and its answers over time."""
        steps = sorted(self.by_step)
        last = len(steps) - 1
        few = range(min(len(steps), MOST_EVALUATIONS))
        kept = [steps[round(i * last / max(1, len(few) - 1))] for i in few]
        return [
            {
                "id": key,
                "prompt": str(a.get("prompt", "")),
                "references": [str(r) for r in a.get("references") or ()],
                "answers": [(step, self.by_step[step][key]) for step in kept if key in self.by_step[step]],
            }
            for key, a in self.questions.items()
        ]


def write_page(run_dir: Path, curves: Curves, answers: Answers, status: str) -> Path:
    """Write report.html into a run directory; return its path."""
    file = run_dir / "report.html"
    write_whole(file, page(HERE / "run.html", (HERE / "run.js",), data(run_dir, curves, answers, status)))
    return file


def data(run_dir: Path, curves: Curves, answers: Answers, status: str) -> dict[str, Any]:
    """Return all that the page shows, from the files of a run directory and the numbers that are in memory."""
    known, summary, environment = (read_json(run_dir / f) for f in (FACTS, "summary.json", "environment.json"))
    config = read_config(run_dir) if (run_dir / CONFIG).is_file() else {}
    typed = read_yaml(run_dir / OVERRIDES)
    overrides = [str(o) for o in typed] if isinstance(typed, list) else []
    name, group = names(run_dir)
    return {
        "name": name,
        "group": group,
        "folder": str(run_dir),
        "command": command(environment.get("command"), overrides),
        "commit": commit(environment),
        "started": str(environment.get("started", "")),
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
        "written_s": round(time.time()),
        "status": status,
        "error": str(summary.get("error", "")) if status == "failed" else "",
        "skipped": len(summary["skipped"]) if isinstance(summary.get("skipped"), list) else 0,
        "max_steps": known.get("steps"),
        "facts": texts(known.get("facts")),
        "machine": texts(known.get("machine")),
        "versions": texts({"python": environment.get("python"), **(environment.get("packages") or {})}),
        "platform": str(environment.get("platform", "")),
        "differences": differences_from_defaults(config, overrides),
        "first": curves.first,
        "last": curves.last,
        "curves": {name: curve.points() for name, curve in sorted(curves.by_name.items())},
        "time": curves.totals,
        "timed_steps": max(1, curves.timed_steps),
        "data": json_safe(read_json(run_dir / "data.json")),
        "row": json_safe(read_json(run_dir / "row.json")),
        "answers": answers.shown(),
        "links": [str(f.relative_to(run_dir)) for f in sorted((run_dir / "profile").glob("*")) if f.is_file()],
        "profile": profile_table(run_dir),
    }


def profile_table(run_dir: Path) -> str:
    """Return the table of the profile, nothing where there is none."""
    file = run_dir / "profile" / "table.txt"
    return read_text(file) if file.is_file() else ""


def texts(node: Any) -> dict[str, str]:
    """Return the entries of a record as texts."""
    return {str(k): str(v) for k, v in node.items() if v is not None} if isinstance(node, Mapping) else {}


def json_safe(node: dict[str, Any]) -> dict[str, Any]:
    """Return a record whose numbers are finite, an empty one where one is not: a page's JSON holds no NaN."""
    try:
        json.dumps(node, allow_nan=False)
    except ValueError:
        return {}
    return node


def read_status(run_dir: Path) -> str:
    """Return the status of a run that this process does not run."""
    return str(read_summary(run_dir).get("status", "running"))
