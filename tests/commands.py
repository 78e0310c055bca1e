"""Runs for everything that comes after training, made once, commands run in this process, and a hub on loopback."""

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.asymmetric import model_that_listens, reciter, two_passages
from tests.local_hub import TOKEN, LocalHub

Typed = Callable[..., str]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}<pad>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def run_here(module: str, *arguments: str) -> str:
    """Run a command in this process and return what it printed; for fixtures that outlive one test."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as shown:
        patch.setattr(sys, "argv", [f"sftlab-{module}", *arguments])
        import_module(f"sftlab.{module}").main()
    return shown.getvalue()


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the demo: 40 steps, enough to answer in the right form."""
    folder = tmp_path_factory.mktemp("demo") / "run, [of] 'today'=1"
    run_here("train", f"run_dir={folder}", "trainer.max_steps=40", "evaluation.num_answers=8", "tracker=none")
    return folder


@pytest.fixture(scope="session")
def rye_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run written by hand, from a model that knows nothing to one that says " rye bread" after every "Answer:".

    The best of its three evaluations is neither the first nor the last, and its data are questions on two passages.
    """
    folder = tmp_path_factory.mktemp("rye")
    reciter(folder / "base", " rye bread", after="Answer:", hears=1 / 320)
    reciter(folder / "run" / "model", " rye bread", after="Answer:")
    questions = two_passages(folder / "questions.jsonl")
    write_config(folder / "run", folder / "base", questions)
    metrics: list[dict[str, Any]] = [
        {"step": 0, "val/loss": 6.0, "val/perplexity": 403.43, "val/f1": 0.125},
        *({"step": s, "train/loss": 6.0 - s / 2} for s in range(1, 5)),
        {"step": 4, "val/loss": 3.0, "val/perplexity": 20.09, "val/f1": 0.75},
        *({"step": s, "train/loss": 6.0 - s / 2} for s in range(5, 9)),
        {"step": 8, "val/loss": 3.5, "val/perplexity": 33.12, "val/f1": 0.5},
    ]
    (folder / "run" / "metrics.jsonl").write_text("".join(f"{json.dumps(m)}\n" for m in metrics))
    summary = {"status": "finished", "score": 3.5, "steps": 1008, "wall_s": 5400.0}
    (folder / "run" / "summary.json").write_text(json.dumps(summary))
    environment = {
        "command": [
            "/opt/python",
            "/opt/lab/sftlab/train.py",
            f"run_dir='{folder}/run'",
            "data=squad",
            "name=rye bread",
        ],
        "git_commit": "c0ffee",
        "git_diff": "",
        "packages": {"sftlab": "1.2.3", "torch": "2.11.0", "transformers": "not installed", "numpy": "2.0.0"},
    }
    (folder / "run" / "environment.json").write_text(json.dumps(environment))
    return folder / "run"


@pytest.fixture(scope="session")
def listening_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model's answers hang on every token of the prompt, a chat's system message included."""
    folder = tmp_path_factory.mktemp("listening")
    model_that_listens(folder / "run" / "model", TEMPLATE)
    write_config(folder / "run", folder / "run" / "model", two_passages(folder / "questions.jsonl"))
    return folder / "run"


def write_config(run: Path, base: Path, questions: Path) -> None:
    """Write the config of a run that was trained from `base` on questions in SQuAD's schema."""
    import yaml

    from tests.runs import compose

    config = compose(run, base, (questions, questions), "name=rye", "seed=7", "trainer.batch_size=12")
    (run / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture
def shapes() -> Iterator[list[tuple[int, ...]]]:
    """The shapes of all tokens that any model in this process is given meanwhile, but for those of the probe."""
    import torch

    seen: list[tuple[int, ...]] = []

    def watch(module: Any, given: Any) -> None:
        if isinstance(module, torch.nn.Embedding):
            seen.append(tuple(given[0].shape))

    watching = torch.nn.modules.module.register_module_forward_pre_hook(watch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sftlab.inference.loaded_model.probe", lambda *given: None)
        yield seen
    watching.remove()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    """A hub on loopback that this process takes for the only one."""
    import huggingface_hub
    from huggingface_hub import constants

    with LocalHub().running() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        huggingface_hub.utils.disable_progress_bars()
        huggingface_hub.utils.close_session()
        yield hub
        huggingface_hub.utils.close_session()
        huggingface_hub.utils.enable_progress_bars()


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Typed:
    """Run a command in this process (importing torch takes seconds) and return what it printed."""

    def run(module: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"sftlab-{module}", *arguments])
        import_module(f"sftlab.{module}").main()
        return capfd.readouterr().out

    return run


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Typed:
    """Run a command in this process, see that it exits with 1 and one error without a traceback; return the error."""

    def run(module: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"sftlab-{module}", *arguments])
        capfd.readouterr()  # what ran before this command
        with pytest.raises(SystemExit) as stop:
            import_module(f"sftlab.{module}").main()
        out, error = capfd.readouterr()
        assert (stop.value.code, out) == (1, "")
        assert error.startswith("error: ") and "Traceback" not in error and "Error executing" not in error
        return error

    return run
