"""No process outlives the run that started it: forked workers, engines on a leash, ranks."""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sftlab.common import leash
from sftlab.common.process import birth, machine
from tests.support import REPO

ENV = os.environ | {"PYTHONPATH": str(REPO)}


def gone(pid: int, limit_s: float = 15) -> bool:
    """Return whether a process ends within a time."""
    deadline_s = time.monotonic() + limit_s
    while birth(pid) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return not birth(pid)


@pytest.fixture
def parent() -> Iterator[Callable[..., "tuple[subprocess.Popen[str], list[int]]"]]:
    """Start Python code that prints the process ids of its children on one line; all are ended afterwards.

    They live when it returns, unless `lives` is false: a child that ends at once may be gone before it is looked at.
    """
    started: list[subprocess.Popen[str]] = []
    children: list[int] = []

    def start(code: str, lives: bool = True) -> "tuple[subprocess.Popen[str], list[int]]":
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=ENV, start_new_session=True
        )
        started.append(process)
        assert process.stdout is not None and select.select([process.stdout], [], [], 60)[0]
        children.extend(map(int, process.stdout.readline().split()))
        assert children and (not lives or all(birth(pid) for pid in children))
        return process, list(children)

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    for pid in children:
        if birth(pid):
            os.kill(pid, signal.SIGKILL)


POOL = """
import os, signal, time
from multiprocess import Manager, Pool
from sftlab.common.process import tie_forks
tie_forks()
with Manager() as manager, Pool(3) as pool:
    print(*pool.map(lambda _: (time.sleep(0.3), os.getpid())[1], range(3), 1), manager._process.pid, flush=True)
    pool.map(lambda _: time.sleep(100), range(3))
"""


def test_gauntlet_40_tokenising_workers_end_with_a_parent_that_is_killed(
    parent: Callable[..., "tuple[subprocess.Popen[str], list[int]]"],
) -> None:
    """`datasets` tokenises in such a pool, beside a manager that waits for good."""
    process, workers = parent(POOL)
    process.kill()
    process.wait()
    assert len(set(workers)) > 1 and all(gone(pid) for pid in workers)


ENGINE = """
import os, sys, time
from sftlab.common import leash
code = "import os, subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(9)']); "
code += "print(os.getpid(), os.getppid(), p.pid, flush=True); time.sleep(99)"
held = leash.start([sys.executable, "-SEc", code], os.environ)
time.sleep(100)
"""


def test_gauntlet_40_an_engine_and_what_it_started_end_with_a_parent_that_is_killed(
    parent: Callable[..., "tuple[subprocess.Popen[str], list[int]]"],
) -> None:
    process, family = parent(ENGINE)
    process.kill()
    process.wait()
    assert all(gone(pid) for pid in family)


def test_an_engine_ends_when_its_leash_is_killed(
    parent: Callable[..., "tuple[subprocess.Popen[str], list[int]]"],
) -> None:
    _, (engine, between, _) = parent(ENGINE)
    os.kill(between, signal.SIGKILL)
    assert gone(engine)


def test_a_leash_gives_the_programs_code_and_ends_what_does_not_end_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert leash.start([sys.executable, "-SEc", "raise SystemExit(7)"], os.environ).wait(20) == 7
    ready = tmp_path / "ready"
    deaf = f"import signal, time; signal.signal(15, signal.SIG_IGN); open({str(ready)!r}, 'w'); time.sleep(99)"
    script = tmp_path / "leash.py"
    script.write_text(Path(leash.__file__).read_text().replace("GRACE_S = 15.0", "GRACE_S = 0.3"))
    monkeypatch.setattr(leash, "__file__", str(script))
    process = leash.start([sys.executable, "-SEc", deaf], os.environ)
    while not ready.exists():
        time.sleep(0.01)
    process.terminate()
    assert process.wait(20) == 128 + signal.SIGKILL


RANK = """
import os, signal, subprocess, sys, time
code = '''
import os, signal, sys, time
from sftlab.common import process
process.WATCH_S, process.SAVE_S = 0.05, {save_s}
signal.signal(signal.SIGTERM, lambda *_: {on_term})
print(os.getpid(), flush=True)
process.end_with_parent(signal.SIGTERM, {parent})
while True: time.sleep(0.1)
'''
subprocess.Popen([sys.executable, "-c", code.replace("PARENT", str(os.getpid()))])
time.sleep(100)
"""


@pytest.mark.parametrize("saves", [True, False])
def test_gauntlet_40_a_rank_without_its_launcher_saves_and_ends(
    parent: Callable[..., "tuple[subprocess.Popen[str], list[int]]"], tmp_path: Path, saves: bool
) -> None:
    on_term = f"(open({str(tmp_path / 'saved')!r}, 'w').close(), os._exit(75))" if saves else "None"
    code = RANK.format(save_s=100 if saves else 0.2, on_term=on_term, parent="PARENT")
    process, (rank,) = parent(code)
    process.kill()
    process.wait()
    assert gone(rank) and (tmp_path / "saved").exists() == saves


def test_a_rank_whose_launcher_died_before_it_looked_ends_too(
    parent: Callable[..., "tuple[subprocess.Popen[str], list[int]]"],
) -> None:
    _, (rank,) = parent(RANK.format(save_s=0.2, on_term="os._exit(75)", parent=2**22), lives=False)
    assert gone(rank)


def test_a_machine_is_more_than_its_name() -> None:
    assert len(machine()) > 30 if sys.platform == "linux" else machine()
