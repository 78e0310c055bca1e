"""A worker: a copy of the tree, and a process that has the slow libraries imported and forks a child per pytest run.

Importing torch and its friends costs 8 s; a child that is forked has them already, and imports only the tree's own code
and tests. Children run one at a time in a process group of their own, and whatever they leave behind is killed.
"""

import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

PRELOAD = (
    *("torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.utils.tensorboard"),
    *("transformers", "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto"),
    *("datasets", "safetensors.torch", "hydra", "hypothesis", "rich.progress", "optuna", "scipy.optimize"),
)
MARK = "MUTATION_CHILD"  # in the environment of everything that a child starts
STARTUP = """import os

def measure():
    if "COVERAGE_PROCESS_START" in os.environ:
        import coverage
        if inherited := coverage.Coverage.current():
            inherited._auto_save = False
            inherited.stop()
        coverage.process_startup(force=True)

measure()
os.register_at_fork(after_in_child=measure)  # coverage's own patch would keep the context of the parent's start
"""


def copy_tree(root: Path, folder: Path) -> Path:
    """Copy what git has of the tree, changes included, into `folder`/tree, a repository of its own."""
    tree = folder / "tree"
    listed = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=root, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        shutil.copytree(root, tree)
    else:
        for name in filter(None, listed.stdout.split("\0")):
            if (root / name).is_file():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, tree / name)
        git = ["git", "-c", "user.name=mutation", "-c", "user.email=mutation@localhost", "-c", "commit.gpgsign=false"]
        for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "The tree as it is"]):
            subprocess.run([*git, *command], cwd=tree, check=True, capture_output=True)
    if (root.parent / "shared").is_dir():  # real data, which some tests use where it is there
        (folder / "shared").symlink_to(root.parent / "shared")
    (tree / "sitecustomize.py").write_text(STARTUP)
    return tree


class Worker:
    """The driver's side: put a bug in, have tests run, take it out."""

    def __init__(self, root: Path, preload: Sequence[str] = PRELOAD) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mutation-"))
        self.tree = copy_tree(root, self.folder)
        self.clock = int(time.time()) - 10**6  # each text that is put in has a second of its own, or a .pyc would stand
        environment = os.environ | {
            "PYTHONPATH": str(self.tree),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.log = (self.folder / "log").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, __file__, *preload],
            cwd=self.tree,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def run(self, tests: Sequence[str], limit: float, coverage: Path | None = None) -> dict[str, Any]:
        """Run tests (node ids, or a file to measure) in a fresh child, up to the first failure unless measured."""
        assert self.process.stdin and self.process.stdout
        request = {"tests": list(tests), "limit": limit, "coverage": coverage and str(coverage)}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        reply = self.process.stdout.readline()
        if not reply:
            raise RuntimeError(f"a worker died; its log is {self.folder / 'log'}")
        return dict(json.loads(reply))

    def run_with(self, file: str, text: str, tests: Sequence[str], limit: float) -> dict[str, Any]:
        """Run tests with this text in the file's place, and put the file back."""
        path, original = self.tree / file, (self.tree / file).read_bytes()
        try:
            self._put(path, text.encode())
            return self.run(tests, limit)
        finally:
            self._put(path, original)

    def _put(self, path: Path, content: bytes) -> None:
        self.clock += 1
        path.write_bytes(content)
        os.utime(path, (self.clock, self.clock))

    def close(self) -> None:
        """End the worker and what it runs, and remove its tree."""
        self.process.terminate()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.log):
            if pipe:
                with suppress(BrokenPipeError):
                    pipe.close()
        end_marked(str(self.folder))
        shutil.rmtree(self.folder, ignore_errors=True)


def end_marked(mark: str) -> None:
    """Kill every process that carries this mark in its environment (those that left the group of their own accord)."""
    wanted = f"{MARK}={mark}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # not ours, or gone
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)


def serve(preload: Sequence[str]) -> None:
    """Answer the driver: one pytest run per line."""
    import importlib

    # As when pytest imports them: what they log to is not the process's own standard error.
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for name in ("pytest", "coverage", *preload):
            with suppress(ImportError):
                importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a child prints goes to the log
    sys.path[0] = os.getcwd()  # the tree, in place of this folder
    folder = Path.cwd().parent
    for line in sys.stdin:
        answers.write(json.dumps(_supervise(json.loads(line), folder)) + "\n")
        answers.flush()


def _supervise(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run one child to its end or its limit; kill what it leaves behind."""
    result, scratch = folder / "result.json", folder / "scratch"
    result.unlink(missing_ok=True)
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            _child(request, result, scratch, str(folder))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(70)
    process = os.pidfd_open(child)
    ended = bool(select.select([process], [], [], request["limit"])[0])
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    end_marked(str(folder))
    os.waitpid(child, 0)
    os.close(process)
    shutil.rmtree(scratch, ignore_errors=True)
    reply = json.loads(result.read_text()) if ended and result.exists() else {"passed": [], "failed": {}}
    if not ended:
        reply["outcome"] = "timed out"
    elif not result.exists():
        reply |= {"outcome": "failed", "failed": {"pytest": "the process ended without a result"}}
    return reply | {"seconds": time.monotonic() - begun}


def _child(request: dict[str, Any], result: Path, scratch: Path, mark: str) -> None:
    os.setsid()
    os.environ[MARK] = mark
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    sys.modules["__main__"] = types.ModuleType("__main__")  # a spawned process must not import this file as its main
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.path.insert(0, str(Path(__file__).parent))
    import pytest
    from plugin import Chosen, Mapper

    sys.path.pop(0)
    options = ["-p", "no:cacheprovider", "--basetemp", str(scratch), "-m", "not slurm and not gpu"]
    options += ["-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"]  # by what was preloaded
    if request["coverage"]:
        mapper = Mapper(Path(request["coverage"]))
        code = int(pytest.main([*options, *request["tests"]], plugins=[mapper]))
        reply: dict[str, Any] = {"outcome": "passed" if code == 0 else "failed", "code": code, **mapper.finish()}
    else:
        chosen = Chosen(request["tests"])
        files = list(dict.fromkeys(test.partition("::")[0] for test in request["tests"]))
        code = int(pytest.main([*options, "-x", *files], plugins=[chosen]))
        failed = code not in (0, 5)  # 5: nothing was run
        if failed and not chosen.failed:
            chosen.failed["pytest"] = f"exit code {code}"
        outcome = "failed" if failed else "passed"
        reply = {"outcome": outcome, "code": code, "passed": chosen.passed, "failed": chosen.failed}
    unfinished = result.with_suffix(".part")
    unfinished.write_text(json.dumps(reply))
    unfinished.rename(result)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1:])
