"""The index of a checkpoint: which tensor lies where in which file. It is read as data; nothing in it can run.

DCP writes its index, `.metadata`, as a pickle. A pickle may name any class and have it called, so no class is ever
given to this one: each name on an exact list becomes an inert record, which holds what it was given. The index is then
made from the records' contents, after each was checked. torch's own reader still reads the same file.
"""

import io
import math
import pickle
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

DCP = "torch.distributed.checkpoint.metadata"
NAMES = {
    *((DCP, kind.__name__) for kind in (BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex)),
    *((DCP, kind.__name__) for kind in (StorageMeta, TensorProperties, TensorStorageMetadata)),
    (DCP, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
    ("collections", "OrderedDict"),
    ("builtins", "getattr"),  # how Python 3.11.0 to 3.11.3 pickle an enum's member
    *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
}


class NoIndex(pickle.UnpicklingError, ValueError):
    """A checkpoint's index that is none, or asks for what no index needs."""


class Record:
    """What stands for one object of a pickle: the arguments it was made with and the state it was given."""

    __slots__ = ("arguments", "state")
    name = ""
    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> "Record":
        """Return a record; it calls nothing."""
        made = super().__new__(cls)
        made.arguments, made.state = arguments, None
        return made

    def __setstate__(self, state: Any) -> None:
        """Keep the state."""
        self.state = state


class Inert(pickle._Unpickler):
    """An unpickler that makes records instead of objects.

    It is the one written in Python: the one in C takes memory for as many memos as a pickle says that it has.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self.kinds: dict[tuple[str, str], type[Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return a kind of record. Raises: NoIndex for a name that no index consists of."""
        if (module, name) not in NAMES:
            raise NoIndex(f"a checkpoint's index asks for {module}.{name}: it is not one of ours")
        made = type(name, (Record,), {"__slots__": (), "name": name})
        return self.kinds.setdefault((module, name), made)


def read_index(content: bytes) -> Metadata:
    """Return the index that `.metadata` holds. Raises: NoIndex if it holds anything but an index."""
    try:
        return index(Inert(content).load())
    except NoIndex:
        raise
    except Exception as error:  # a wrong pickle fails in any way: too few arguments, a cut text, a wrong type
        raise NoIndex(f"this is not a checkpoint's index ({type(error).__name__}: {error})") from None


def index(record: Any) -> Metadata:
    """Return the index that records describe, made anew from plain values."""
    state = state_of(record, "Metadata")
    storage = {place(k): part(v) for k, v in expect(state["storage_data"], dict).items()}
    tensors = {expect(k, str): entry(v) for k, v in expect(state["state_dict_metadata"], dict).items()}
    stored = dict.fromkeys(tensors, 0)
    for at, where in storage.items():
        if at.fqn not in stored:
            raise NoIndex(f"a checkpoint's index places {at.fqn!r}, which it does not describe")
        stored[at.fqn] += where.length
    for name, found in tensors.items():  # before memory is taken for it
        if isinstance(found, TensorStorageMetadata):
            num_bytes = math.prod(found.size) * found.properties.dtype.itemsize
            if num_bytes > stored[name]:
                raise NoIndex(f"{name} takes {num_bytes} bytes, and {stored[name]} are stored")
    return Metadata(
        state_dict_metadata=tensors,
        planner_data={expect(k, str): keys(v) for k, v in expect(state.get("planner_data") or {}, dict).items()},
        storage_data=storage,
        storage_meta=StorageMeta(),
    )


def entry(record: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    """Return what is stored under one name."""
    if type(record).__name__ == "BytesStorageMetadata":
        return BytesStorageMetadata()
    state = state_of(record, "TensorStorageMetadata")
    dtype, *_ = expect(state_of(state["properties"], "TensorProperties"), tuple)
    named = getattr(torch, dtype.name, None) if isinstance(dtype, type) and issubclass(dtype, Record) else None
    if not isinstance(named, torch.dtype):
        raise NoIndex(f"a checkpoint's index names {dtype!r} as a dtype")
    states = [state_of(chunk, "ChunkStorageMetadata") for chunk in expect(state["chunks"], list)]
    chunks = [ChunkStorageMetadata(size(chunk["offsets"]), size(chunk["sizes"])) for chunk in states]
    whole = size(state["size"])
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(whole):
        raise NoIndex(f"a checkpoint's index has a tensor of shape {tuple(whole)} with parts missing")
    return TensorStorageMetadata(TensorProperties(dtype=named), whole, chunks)


def place(record: Any) -> MetadataIndex:
    """Return the name and offset by which a stored part is found."""
    state = state_of(record, "MetadataIndex")
    at, number = state.get("offset"), state.get("index")
    return MetadataIndex(
        expect(state["fqn"], str), None if at is None else size(at), None if number is None else expect(number, int)
    )


def part(record: Any) -> _StorageInfo:
    """Return where a part lies: in a file of the checkpoint's own folder, stored as it is."""
    state = state_of(record, "_StorageInfo")
    name = expect(state["relative_path"], str)
    if PurePath(name).name != name or "\\" in name or name.startswith("."):
        raise NoIndex(f"a checkpoint's index names the file {name!r}, which is not one of its own")
    if state.get("transform_descriptors"):
        raise NoIndex("a checkpoint's index asks for a transformation of its files: none is ours")
    offset, length = expect(state["offset"], int), expect(state["length"], int)
    if offset < 0 or length < 0:
        raise NoIndex(f"a checkpoint's index places a part at {offset} with {length} bytes")
    return _StorageInfo(name, offset, length)


def size(record: Any) -> torch.Size:
    """Return a shape."""
    if type(record).__name__ != "Size" or not isinstance(record, Record) or len(record.arguments) != 1:
        raise NoIndex(f"a checkpoint's index has {record!r} where a shape belongs")
    numbers = [expect(number, int) for number in expect(record.arguments[0], tuple)]
    if any(number < 0 for number in numbers):
        raise NoIndex(f"a checkpoint's index has the shape {numbers}")
    return torch.Size(numbers)


def keys(value: Any) -> tuple[str | int, ...]:
    """Return the keys that lead to a value in the nested state."""
    found = expect(value, tuple)
    if any(type(key) not in (str, int) for key in found):
        raise NoIndex(f"a checkpoint's index names the keys {found!r}")
    return tuple(found)


def state_of(record: Any, name: str) -> Any:
    """Return the state of a record of this name, with text keys. Raises: NoIndex if it is another."""
    if not isinstance(record, Record) or record.name != name or not isinstance(record.state, Mapping | tuple):
        raise NoIndex(f"a checkpoint's index has {record!r} where a {name} belongs")
    return record.state


def expect(value: Any, kind: type) -> Any:
    """Return a value of exactly this type. Raises: NoIndex if it is of another."""
    if type(value) is not kind:
        raise NoIndex(f"a checkpoint's index has a {type(value).__name__} where {kind.__name__} belongs")
    return value
