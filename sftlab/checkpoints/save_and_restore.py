"""Checkpoints: everything a run needs to resume, sharded over its ranks, complete or absent.

A save copies the state and returns. A thread then writes it by torch.distributed.checkpoint (DCP) under a
temporary name, reads it back for its checksums, and renames it. The thread's collectives have their own gloo group,
because an asynchronous save hangs on the group that trains. A resume finds the newest undamaged checkpoint itself; the
link `latest` is for people. The plan needs no state beyond the step. The manifest proves that a folder is whole.
"""

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from sftlab.checkpoints import manifest, rng
from sftlab.checkpoints.hugging_face import SIDECAR
from sftlab.checkpoints.pretrained import WRAPPER
from sftlab.checkpoints.staging import Staging, local_bytes
from sftlab.common.files import remove, sync, sync_tree
from sftlab.models.adapters import has_adapter
from sftlab.models.scorer import Scorer
from sftlab.parallel.world import World

T = TypeVar("T")
CHANGED = {  # what it means that the identity of a checkpoint is not the run's
    "data": "the files of data.path, or the tokenizer, have changed.",
    "base": "the weights of model.name_or_path have changed, and the adapter belongs to the earlier ones.",
}


class SaveFailed(OSError):
    """A checkpoint could not be written. Every rank raises it."""


class Checkpoints:
    """The checkpoints of a run, in `folder`: the newest `keep` are kept, and the one with the lowest score.

    A run without its own checkpoints begins from `source` (a run's directory, or one checkpoint). With `rewind` it
    begins there even if it has some. A checkpoint that is resumed must have the same `identity`, unless `anyway` is
    set. `sidecar` writes what an export needs besides weights.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        world: World,
        say: Callable[[str], None],
        *,
        source: Path | None = None,
        rewind: bool = False,
        identity: Mapping[str, Any] | None = None,
        anyway: bool = False,
        sidecar: Callable[[Path], None] | None = None,
    ) -> None:
        self.folder, self.keep, self.world, self.say = folder, keep, world, say
        self.source, self.rewind, self.sidecar = source, rewind, sidecar
        self.identity, self.anyway = dict(identity or {}), anyway
        self.took_s = 0.0  # the longest time that a save has taken, from its beginning to the complete checkpoint
        self.failed: SaveFailed | None = None  # why the last save that was waited for failed
        self.group = dist.new_group(backend="gloo")
        self.staging = Staging(world.device)
        self.saving: tuple[Thread, Future[None]] | None = None

    def save(self, step: int, scorer: Scorer, optimizer: Optimizer, progress: Mapping[str, Any]) -> None:
        """Begin to write the checkpoint of `step`. Collective: every rank calls it at the same step boundary.

        It waits for the previous save, because there is memory for one copy. `say` reports a save that fails, and
        `failed` keeps its error.
        """
        self.wait()
        model_state, optimizer_state = get_state_dict(scorer, optimizer)
        generators = {rng.key(self.world.rank): rng.state(self.world.device)}
        fetch = self.staging.take({"model": kept(scorer, model_state), "optimizer": optimizer_state, "rng": generators})
        saving: Future[None] = Future()
        full = {"step": step, "num_ranks": self.world.size, **self.identity, **progress}

        def work() -> None:
            try:
                self._write(fetch, full)
            except BaseException as error:
                saving.set_exception(error)
            else:
                saving.set_result(None)

        thread = Thread(target=work, name="checkpoint", daemon=True)  # daemon: a lost rank must not keep this one alive
        thread.start()
        self.saving = thread, saving

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until nothing is being written and the thread has ended.

        The thread holds references to the process groups. When nothing waited for it after a crash, it was
        sometimes the last to drop them, after the interpreter was gone: the rank aborted, once in 48 exits under load.
        """
        saving, self.saving = self.saving, None
        if saving is None:
            return
        thread, result = saving
        thread.join(timeout_s)
        try:
            result.result(0)
            self.failed = None
        except SaveFailed as error:
            self.failed = error

    def close(self, timeout_s: float = 20.0) -> None:
        """Wait for the save in progress, but at most `timeout_s`, because another rank may be gone."""
        with suppress(Exception):
            self.wait(timeout_s)

    def check(self, on_failed_save: str) -> None:
        """Raise SaveFailed if the last save that was waited for failed and `on_failed_save` is stop."""
        if self.failed is not None and on_failed_save == "stop":
            raise self.failed

    def restore(self, scorer: Scorer, optimizer: Optimizer) -> dict[str, Any] | None:
        """Load the newest undamaged checkpoint in place and return its progress; None if there is none at all.

        The run's own checkpoints of later steps are set aside, because those steps will be trained again. Collective.
        Raises: ValueError if all are damaged, or if the chosen one is of other data.
        """
        chosen = self._choose()
        if chosen is None:
            return None
        progress = self.world.broadcast(manifest.read_manifest(chosen) if self.world.is_main else {})
        self._check_identity(chosen, progress)
        if self.world.is_main:
            for later in self.complete():
                if later != chosen and int(later.name.removeprefix(manifest.PREFIX)) > progress["step"]:
                    self._set_aside(later)
        options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        model_state, optimizer_state = get_state_dict(scorer, optimizer)
        state: dict[str, Any] = {"model": kept(scorer, model_state), "optimizer": optimizer_state}
        key = rng.key(self.world.rank)
        if f"rng.{key}" in manifest.Reader(chosen).read_metadata().state_dict_metadata:
            state["rng"] = {key: ""}  # absent if the saving run had fewer ranks
        load(state, storage_reader=manifest.Reader(chosen), planner=manifest.Planner())
        set_state_dict(scorer, optimizer, model_state_dict=model_state, optim_state_dict=state["optimizer"])
        for group, option in zip(optimizer.param_groups, options, strict=True):
            group.update(option)  # the config's, which resume_despite_changes lets differ
        if "rng" in state:
            rng.restore(state["rng"][key], self.world.device)
        self.say(f"resumed from {chosen}, step {progress['step']}")
        return dict(progress)

    def complete(self) -> list[Path]:
        """Return the complete checkpoints of this run, oldest first."""
        return manifest.complete_checkpoints(self.folder)

    def best(self) -> Path | None:
        """Return the complete checkpoint with the lowest score, the earliest of equals; None if none has a score."""
        scores = {}
        for path in self.complete():
            score = manifest.read_manifest(path).get("score")
            if score is not None and math.isfinite(score):
                scores[path] = score
        return min(scores, key=lambda p: scores[p], default=None)

    def _choose(self) -> Path | None:
        """Return the checkpoint to resume, the same on every rank, with every file checked."""
        candidates = self.complete()
        if self.source is not None and (self.rewind or not candidates):
            candidates = (
                [self.source]
                if manifest.is_checkpoint(self.source)
                else manifest.complete_checkpoints(self.source / "checkpoints")
            )
        candidates = self.world.broadcast(candidates)
        for candidate in reversed(candidates):
            parts = self.world.gather(manifest.damage(candidate, self.world.rank, self.world.size))
            wrong = sorted({line for part in parts for line in part})
            if not wrong:
                return candidate
            self.say("\n".join([f"{candidate.name} is damaged and not used:", *wrong]))
            if self.world.is_main and candidate.parent == self.folder and candidate != candidates[0]:
                self._set_aside(candidate)
        if candidates:
            raise manifest.Damaged(
                f"no checkpoint in {candidates[0].parent} is whole: {'; '.join(wrong)}. Restore the files, or remove "
                "the folder to start over"
            )
        return None

    def _check_identity(self, chosen: Path, progress: Mapping[str, Any]) -> None:
        for key, ours in self.identity.items():
            if progress.get(key) != ours and not self.anyway:
                why = CHANGED.get(key, f"its {key} has changed.")
                raise ValueError(
                    f"{chosen} was made with other {key} ({progress.get(key)} there, {ours} here): {why} "
                    "resume_despite_changes=true resumes all the same"
                )

    def _write(self, fetch: Callable[[], dict[str, Any]], progress: dict[str, Any]) -> None:
        """Write the state that `fetch` returns. This runs on a thread of every rank at the same time."""
        began_s = time.perf_counter()
        final = self.folder / f"{manifest.PREFIX}{progress['step']:08d}"
        partial = self.folder / f".{final.name}.partial"
        state: dict[str, Any] = {}
        try:
            self._agree(lambda: state.update(fetch()))
            num_bytes = sum(self._agree(lambda: local_bytes(state)))
            self._agree(lambda: self._prepare(partial, num_bytes) if self.world.is_main else None)
            with one_checksum():
                save(state, storage_writer=FileSystemWriter(partial), process_group=self.group)
            described = self._agree(lambda: manifest.sizes_and_checksums(partial, self._own_files(partial)))
            files = {name: facts for part in described for name, facts in part.items()}
            self._agree(lambda: self._publish(partial, final, progress, files) if self.world.is_main else None)
        except (OSError, CheckpointException, manifest.Damaged) as error:
            if self.world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            kept = self.complete()
            reason = f"{'; '.join(causes(error))}; {f'{kept[-1].name} is intact' if kept else 'no earlier one exists'}"
            self.say(f"step {progress['step']}: the checkpoint could not be written: {reason}")
            raise SaveFailed(f"the checkpoint of step {progress['step']} could not be written: {reason}") from error
        self.took_s = max(self.took_s, time.perf_counter() - began_s)
        self.say(f"step {progress['step']}: saved in {time.perf_counter() - began_s:.1f} s")

    def _agree(self, act: Callable[[], T]) -> list[T]:
        """Return every rank's result of `act`; an error on one is raised on all."""
        mine: tuple[T | None, Exception | None]
        try:
            mine = (act(), None)
        except Exception as error:
            mine = (None, error)
        found: list[Any] = [None] * self.world.size
        dist.all_gather_object(found, mine, group=self.group)
        for _, failure in found:
            if failure is not None:
                raise failure
        return [result for result, _ in found]

    def _prepare(self, partial: Path, num_bytes: int) -> None:
        for left in self.folder.glob(f".{manifest.PREFIX}*.partial"):  # left by a run that was killed
            remove(left)
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < num_bytes:  # fail before the disk is full: metrics and logs may be on it
            raise OSError(f"it takes {num_bytes / 2**20:,.0f} MiB, {self.folder} has {free / 2**20:,.0f} MiB left")
        partial.mkdir()
        if self.sidecar is not None:
            try:
                self.sidecar(partial / SIDECAR)
            except Exception as error:
                if type(error) is not Exception:
                    raise
                raise OSError(str(error)) from error  # all that the Rust tokenizers raise when the disk is full

    def _own_files(self, partial: Path) -> list[str]:
        """Return the names of the files that this rank answers for."""
        mine = [p.name for p in partial.glob(f"__{self.world.rank}_*")]
        if self.world.is_main:
            beside = [p for p in (partial / SIDECAR).rglob("*") if p.is_file()]
            mine += [manifest.METADATA, *(str(p.relative_to(partial)) for p in beside)]
        return mine

    def _publish(self, partial: Path, final: Path, progress: Mapping[str, Any], files: dict[str, list[int]]) -> None:
        manifest.write_manifest(partial, progress, files)
        sync_tree(partial)
        if final.exists():
            self._set_aside(final)
        partial.rename(final)
        sync(self.folder)
        best = self.best()
        for old in self.complete()[: -self.keep]:
            if old != best:
                (old / manifest.NAME).unlink()  # so that a half-deleted checkpoint is never taken for whole
                shutil.rmtree(old)
        new = self.folder / ".latest"
        try:
            new.unlink(missing_ok=True)
            new.symlink_to(final.name)
            os.replace(new, self.folder / "latest")
        except OSError as error:  # the disk has no links, or a copy followed them: nothing depends on it
            self.say(f"checkpoints/latest could not be set: {error}")

    def _set_aside(self, path: Path) -> None:
        aside = path.with_name(f"aside_{time.time_ns()}_{path.name}")
        path.rename(aside)
        self.say(f"{path.name} is set aside as {aside.name}")


@contextmanager
def one_checksum() -> Iterator[None]:
    """Turn off torch's own checksums, which a load never checks: 1.2 GB took 1.4 s with both, 0.7 s with ours only."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def kept(scorer: Scorer, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a scorer's state that a checkpoint holds: each tied tensor once, no frozen weight.

    With an adapter that is the adapter alone, without the base's buffers: all of the base is read from its own files.
    """
    if has_adapter(scorer.model):
        trained = (name for name, p in scorer.model.named_parameters() if p.requires_grad)
        names = {f"model.{name.replace(WRAPPER, '')}" for name in trained}
        return {name: value for name, value in state.items() if name in names}
    tied = {f"model.{name}" for name in scorer.model.all_tied_weights_keys}
    return {name: value for name, value in state.items() if name not in tied}


def causes(error: BaseException) -> list[str]:
    """Return what went wrong, in words; the ranks' errors are unwrapped from DCP's."""
    if isinstance(error, CheckpointException):
        return sorted({f"{type(e).__name__}: {e}" for e, _ in error.failures.values()})
    return [str(error)]
