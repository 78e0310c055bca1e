"""docs/guide.md as it stands: every command and program in it is run, in its order, in a folder of its own.

What differs from the page is in SUBSTITUTIONS, and nowhere else: the gated model, data that needs a network, the number
of processes, the number of steps, a busy port and a task from the hub. `python` is one that has imported torch before.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from sftlab.assets import FOLDER as ASSETS
from tests.local_hub import LocalHub
from tests.support import REPO, free_port, read_jsonl
from tests.warm import warm

GUIDE = (REPO / "docs" / "guide.md").read_text(encoding="utf-8")
PORT = free_port()
DEMO = yaml.safe_load((REPO / "conf" / "data" / "demo.yaml").read_text())
SUBSTITUTIONS = {
    "model=llama3_2_1b": "model=demo",
    "data=squad": f"data=squad data.path={DEMO['path']} data.val_path={DEMO['val_path']}",
    "sftlab.train ": "sftlab.train trainer.max_steps=10 evaluation.num_answers=8 ",
    "--nproc-per-node 8": "--nproc-per-node 2",
    "tasks=[hellaswag]": "tasks=[lighthouses] tasks_path=tasks",
    "sftlab.serve": "sftlab.serve engine=transformers",
    "8000": str(PORT),
}
TASK = """task: lighthouses
dataset_path: json
dataset_kwargs: {data_files: {test: tasks/documents.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{question}} Answer:"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def test_the_page_holds_six_steps_and_their_commands() -> None:
    steps = re.findall(r"^## (.*)$", GUIDE, re.MULTILINE)
    assert steps[1:] == ["Prepare", "Train", "Infer", "Evaluate", "Publish", "Serve"]
    named = set(re.findall(r"^python -m sftlab\.(\w+)", GUIDE, re.MULTILINE))
    assert named == {"preview", "train", "generate", "evaluate", "publish", "serve"}
    assert [word for word in SUBSTITUTIONS if word not in GUIDE] == []  # none outlives what it stood for
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", GUIDE):
        assert (REPO / "docs" / target).exists(), target


@dataclass
class Walk:
    """Runs the page's blocks in a folder; `printed` is what each printed."""

    folder: Path
    environment: dict[str, str]
    python: Path
    printed: list[tuple[str, str]] = field(default_factory=list)

    def run(self, language: str, block: str) -> None:
        arguments = ["bash", "-euc", block] if language == "bash" else [str(self.python), "-c", block]
        done = subprocess.run(
            arguments, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        self.printed.append((block, done.stdout))

    @contextmanager
    def server(self, block: str) -> Iterator[None]:
        """Hold a server that answers."""
        process = subprocess.Popen(
            ["bash", "-c", f"exec {block}"],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        shown = ""
        try:
            for line in process.stdout:
                shown += line
                if "ready after" in line:
                    break
            assert "ready after" in shown, shown
            self.printed.append((block, shown))
            yield
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()
            process.wait()
            process.stdout.close()

    def said(self, *words: str) -> list[str]:
        """What the blocks that hold these words printed."""
        return [out for block, out in self.printed if all(w in block for w in words)]


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    """The whole page, walked through once."""
    folder = tmp_path_factory.mktemp("guide")
    questions = (ASSETS / "demo" / "validation.jsonl").read_text().splitlines()[:5]
    (folder / "questions.jsonl").write_text("".join(f"{q}\n" for q in questions))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "lighthouses.yaml").write_text(TASK)
    row = {"question": "Who keeps the light?", "choices": ["the keeper", "the oven"], "gold": 0}
    (folder / "tasks" / "documents.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    (binaries := tmp_path_factory.mktemp("bin")).chmod(0o700)
    with ExitStack() as stack:
        hub = stack.enter_context(LocalHub().running())
        environment = os.environ | hub.env | {"HF_HOME": str(folder / "home"), "PYTHONPATH": str(REPO)}
        environment |= {"OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
        environment.pop("HF_DATASETS_CACHE", None)
        python = stack.enter_context(
            warm(binaries, environment, "lm_eval", "sftlab.training.validation", "openai")
        ).python
        environment["PATH"] = f"{binaries}:{Path(sys.executable).parent}:{environment['PATH']}"
        environment["PYTHON_EXEC"] = str(python)  # what torchrun starts its ranks with
        walk = Walk(folder, environment, python)
        blocks = re.findall(r"^```(\w*)\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
        assert {language for language, _ in blocks} == {"bash", "python"}
        blocks = [(language, substituted(block)) for language, block in blocks]
        serve = next(i for i, (_, block) in enumerate(blocks) if "sftlab.serve" in block)
        for language, block in blocks[:serve]:
            walk.run(language, block)
        with walk.server(blocks[serve][1].strip()):
            for language, block in blocks[serve + 1 :]:
                walk.run(language, block)
        yield walk


def substituted(block: str) -> str:
    for word, instead in SUBSTITUTIONS.items():
        block = block.replace(word, instead)
    return block


def test_the_page_runs(walk: Walk) -> None:
    assert (walk.folder / "runs" / "squad" / "model" / "model.safetensors").is_file()
    assert (walk.folder / "runs" / "squad_8" / "model" / "model.safetensors").is_file()
    assert len(read_jsonl(walk.folder / "answers.jsonl")) == 5
    scores = json.loads((walk.folder / "runs" / "squad" / "evaluate" / "squad" / "scores.json").read_text())
    assert scores["examples"] == 250 and {"exact_match", "f1", "loss"} <= scores["difference"].keys()
    task = json.loads((walk.folder / "runs" / "squad" / "evaluate" / "lighthouses" / "scores.json").read_text())
    assert 0 <= task["scores"]["acc"] <= 1
    assert (walk.folder / "runs" / "squad" / "publish" / "README.md").is_file()
    assert "published privately" in walk.said("sftlab.publish")[1]


def test_one_and_several_processes_train_the_same(walk: Walk) -> None:
    one, several = (read_jsonl(walk.folder / "runs" / name / "metrics.jsonl") for name in ("squad", "squad_8"))
    losses = [[m["train/loss"] for m in lines if "train/loss" in m] for lines in (one, several)]
    assert len(losses[0]) == 10 and losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_every_way_of_asking_gives_the_same_answer(walk: Walk) -> None:
    """A prompt, fields, transformers on the folder and on the hub, curl and the openai client."""
    prompt, fields = (out.strip() for out in walk.said("sftlab.generate", "1821"))
    folder, hub = (out.strip() for out in walk.said("max_length=100"))
    (by_curl,), (by_client,) = walk.said("curl"), walk.said("OpenAI")
    assert prompt == fields and folder == hub
    texts = [json.loads(by_curl)["choices"][0]["text"], by_client, folder.partition("Answer:")[2]]
    assert all(prompt.startswith(text.strip()) for text in texts) and texts[0].strip() == texts[1].strip()
    assert texts[0].strip() and texts[2].strip()
