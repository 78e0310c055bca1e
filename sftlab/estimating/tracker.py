"""The tracker: the memory of every tensor that lives, by what it is for, and where its sum is greatest.

A dispatch mode sees every operation of a step. A tensor's memory counts from the operation that returned it until its
storage is freed. FSDP frees and fills storages without an operation, by resizing them, so `resize_` is watched too.
What a tensor is for follows from the code that made it. Fake tensors have sizes and no memory, so a step of a model
that fits nowhere can be watched.
Source: the method is that of torch.distributed._tools.mem_tracker, which knows only its own kinds of modules.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

PARTS = ("parameters", "adapter", "gradients", "optimiser", "gathered", "activations", "logits")
# Whose code makes what. `gathered` is what FSDP holds in flight: whole parameters, and gradients on their way.
MAKERS = (
    ("/torch/distributed/fsdp/", "gathered"),
    ("/sftlab/models/head.py", "logits"),
    ("/torch/optim/", "optimiser"),
    ("/torchao/optim/", "optimiser"),
    ("/sftlab/training/optim", "optimiser"),
)
DEPTH = 14  # frames in which the maker is looked for


@dataclass
class Memory:
    """One storage that lives."""

    part: str
    num_bytes: int
    gone: Any = None  # the reference that notes its end


@dataclass
class Peak:
    """The greatest sum of a phase, and what it was made of."""

    total: int = 0
    held: list[tuple[Memory, int]] = field(default_factory=list)

    def parts(self) -> dict[str, int]:
        """Return the bytes of each part."""
        found: Counter[str] = Counter()
        for memory, num_bytes in self.held:
            found[memory.part] += num_bytes
        return {name: found[name] for name in PARTS}


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watch what is allocated inside `with`. `phase` names what goes on; each phase has a peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: dict[int, Memory] = {}
        self.now = 0
        self.phase = "start"
        self.label: str | None = None
        self.peaks: dict[str, Peak] = {}
        self.rising = False  # whether the sum has grown since the last look, so that this may be a peak
        self.num_distinct = 0  # what `torch.unique` returns, which no fake tensor can know

    def __enter__(self) -> "Tracker":
        self.resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            before = storage.nbytes()
            made = self.resize(storage, size)
            self.resized(storage, before, size)
            return made

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch.UntypedStorage.resize_ = self.resize  # type: ignore[method-assign]
        self.look()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note what it returns."""
        if func is torch.ops.aten._unique2.default:
            made: Any = (args[0].new_empty(self.num_distinct), args[0].new_empty(0), args[0].new_empty(0))
        else:
            made = func(*args, **(kwargs or {}))
        part = self.label or maker()
        if part == "gathered":
            for tensor in flat((args, kwargs)):  # whole gradients that FSDP takes to reduce
                memory = self.live.get(tensor.untyped_storage()._cdata)
                if memory is not None and memory.part == "activations":
                    memory.part = part
        new = [t.untyped_storage() for t in flat(made) if t.untyped_storage()._cdata not in self.live]
        if new:
            given = {t.untyped_storage()._cdata for t in flat((args, kwargs))}  # returned in place: not made here
            for storage in new:
                if storage._cdata not in given:
                    self.note(storage, part)
        return made

    def note(self, storage: torch.UntypedStorage, part: str) -> None:
        """Count a storage, if it is new."""
        key = storage._cdata
        if key in self.live or not storage.nbytes():
            return
        self.live[key] = Memory(part, storage.nbytes(), weakref.ref(storage, lambda _: self.free(key)))
        self.now += storage.nbytes()
        self.rising = True

    def free(self, key: int) -> None:
        """Forget a storage."""
        self.look()
        memory = self.live.pop(key, None)
        self.now -= memory.num_bytes if memory else 0

    def resized(self, storage: torch.UntypedStorage, before: int, after: int) -> None:
        """Count a storage anew. Only FSDP resizes."""
        self.look()
        memory = self.live.get(storage._cdata)
        if memory is None:
            return self.note(storage, "gathered")
        memory.part = "gathered" if memory.part == "activations" else memory.part
        self.now += after - memory.num_bytes
        memory.num_bytes = after
        self.rising = True

    def look(self) -> None:
        """Keep what lives now if it is more than ever in this phase."""
        peak = self.peaks.setdefault(self.phase, Peak())
        if self.rising and self.now > peak.total:
            peak.total, peak.held = self.now, [(m, m.num_bytes) for m in self.live.values()]
        self.rising = False

    def begin(self, phase: str) -> None:
        """Begin a phase."""
        self.look()
        self.phase, self.rising = phase, True

    @contextmanager
    def made_by(self, part: str) -> Iterator[None]:
        """Count what is made inside as this part."""
        self.label = part
        try:
            yield
        finally:
            self.label = None

    def mark(self, tensors: Any, part: str) -> None:
        """Say what tensors are for."""
        for tensor in flat(tensors):
            if memory := self.live.get(tensor.untyped_storage()._cdata):
                memory.part = part

    def bytes_of(self, part: str) -> int:
        """Return what lives of a part."""
        return sum(m.num_bytes for m in self.live.values() if m.part == part)


def flat(tree: Any) -> Iterator[Tensor]:
    """Yield the plain tensors of a nested value: the parts of a DTensor, or of a quantised tensor."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            if is_traceable_wrapper_subclass(leaf):
                names, _ = leaf.__tensor_flatten__()
                yield from flat([getattr(leaf, name) for name in names])
            else:
                yield leaf


def maker() -> str:
    """Return what the code that runs now makes."""
    frame = sys._getframe(2)
    for _ in range(DEPTH):
        name = frame.f_code.co_filename
        for folder, part in MAKERS:
            if folder in name:
                return part
        if frame.f_back is None:
            break
        frame = frame.f_back
    return "activations"


def largest(peaks: Mapping[str, Mapping[str, float]]) -> str:
    """Return the phase with the greatest sum."""
    return max(peaks, key=lambda phase: sum(peaks[phase].values()))
