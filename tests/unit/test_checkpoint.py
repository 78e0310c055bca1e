"""What a checkpoint leaves running: nothing."""

import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from sftlab.checkpoints import save_and_restore
from sftlab.models.scorer import Scorer
from sftlab.parallel.fsdp2 import fsdp2
from sftlab.training.optim import adamw
from tests.support import tiny_llama


class SlowToEnd(Future[None]):
    """A result that is known half a second before its thread is over."""

    def set_result(self, result: None) -> None:
        super().set_result(result)
        time.sleep(0.5)


def test_a_save_that_was_waited_for_leaves_no_thread(one: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that outlives its save may be the last to let go of the process groups: SIGABRT in a rank's exit."""
    monkeypatch.setattr(save_and_restore, "Future", SlowToEnd)
    scorer = fsdp2(Scorer(tiny_llama()), one, param_dtype="float32")
    checkpoints = save_and_restore.Checkpoints(tmp_path, 1, one, lambda text: None)
    checkpoints.save(1, scorer, adamw(scorer, lr=1e-3), {"score": None})
    assert "checkpoint" in [t.name for t in threading.enumerate()]
    checkpoints.wait()
    assert "checkpoint" not in [t.name for t in threading.enumerate()]
    assert [p.name for p in checkpoints.complete()] == ["step_00000001"]
