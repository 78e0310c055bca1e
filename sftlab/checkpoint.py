"""Checkpoints: everything a run needs to go on, sharded over its ranks, complete or absent.

A checkpoint is written by torch.distributed.checkpoint under a temporary name and renamed when it is whole; a resume
looks for the newest whole one itself, and `latest` is a link for people. The plan needs no state beyond the step.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from sftlab.distributed import World
from sftlab.models.scorer import Scorer

PREFIX = "step_"


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run, in `folder`; the newest `keep` are kept."""

    folder: Path
    keep: int
    world: World

    def save(self, step: int, scorer: Scorer, optimizer: Optimizer, progress: dict[str, Any]) -> None:
        """Write the checkpoint of `step`. Collective: every rank calls it at the same step boundary."""
        final = self.folder / f"{PREFIX}{step:08d}"
        partial = self.folder / f".{final.name}.partial"
        if self.world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.world.barrier()
        model_state, optimizer_state = get_state_dict(scorer, optimizer)
        save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=str(partial))
        if self.world.is_main:
            (partial / "progress.json").write_text(json.dumps({"step": step, **progress}))
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            self._link(final.name)
            for old in self.complete()[: -self.keep]:
                shutil.rmtree(old)
        self.world.barrier()

    def restore(self, scorer: Scorer, optimizer: Optimizer) -> dict[str, Any] | None:
        """Load the newest complete checkpoint in place and return its progress; None where there is none."""
        newest = self.world.broadcast(str(self.complete()[-1]) if self.complete() else None)
        if newest is None:
            return None
        model_state, optimizer_state = get_state_dict(scorer, optimizer)
        state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
        load(state, checkpoint_id=newest)
        set_state_dict(scorer, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        progress: dict[str, Any] = json.loads((Path(newest) / "progress.json").read_text())
        return progress

    def complete(self) -> list[Path]:
        """Return the complete checkpoints, oldest first."""
        return sorted(p for p in self.folder.glob(f"{PREFIX}*") if (p / "progress.json").is_file())

    def _link(self, name: str) -> None:
        link = self.folder / "latest"
        new = self.folder / ".latest"
        new.unlink(missing_ok=True)
        new.symlink_to(name)
        os.replace(new, link)
