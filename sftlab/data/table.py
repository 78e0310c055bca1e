"""Tables: what `datasets` reads, memory-mapped. From the hub, from Parquet, or from a folder of `save_to_disk`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sftlab.common.files import read_json
from sftlab.data.format import Fields
from sftlab.data.source import Source

TABLE_ROWS = 1000  # rows of a table turned into Python objects at a time

Change = Callable[[Any], Any]


@dataclass(frozen=True)
class Table(Source):
    """The rows of a `datasets.Dataset`; `digest` is the hash of the file that it comes from.

    A columnar file gives every object every key that any has, null where it was absent. Such nulls are left out, at
    every depth; what a cell holds as JSON text is left as it is.
    """

    name: str
    dataset: Any
    digest: str | None = None

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """The hash of the file's bytes; the dataset's own fingerprint for the hub, where it covers the commit."""
        return self.digest or str(self.dataset._fingerprint)

    def __len__(self) -> int:
        return len(self.dataset)

    def where(self, row: int) -> str:
        """Return name and row number, counted from 1."""
        return f"{self.name} row {row + 1}"

    @cached_property
    def changes(self) -> dict[str, Change]:
        """What takes the nulls out of the columns that can have some, by column."""
        found = {name: without_nulls(feature) for name, feature in self.dataset.features.items()}
        return {name: change for name, change in found.items() if change}

    def read_rows(self, start: int, stop: int) -> Iterator[Fields | ValueError]:
        """Yield rows."""
        for first in range(start, min(stop, len(self)), TABLE_ROWS):
            columns = self.dataset[first : min(first + TABLE_ROWS, stop)]
            columns |= {name: [change(v) for v in columns[name]] for name, change in self.changes.items()}
            yield from (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


def without_nulls(feature: Any) -> Change | None:
    """Return what takes null entries out of the objects in a value of this feature; None if it has no objects."""
    if isinstance(feature, dict):
        inner = {name: without_nulls(f) for name, f in feature.items()}
        return lambda value: (
            value and {k: change(v) if (change := inner.get(k)) else v for k, v in value.items() if v is not None}
        )
    if isinstance(feature, list) or hasattr(feature, "feature"):
        of = without_nulls(feature[0] if isinstance(feature, list) else feature.feature)
        return of and (lambda value: value and [of(v) for v in value])
    return None


def load(name: str, key: str, subset: str | None = None, shown: str | None = None, **options: Any) -> Any:
    """Return what `datasets.load_dataset` returns; errors say what can be done."""
    import datasets

    from sftlab.common.hub import explain

    try:
        return datasets.load_dataset(name, subset, **options)
    except Exception as error:
        if shown is None:
            raise explain(error, name, "dataset", key) from error
        cause = error.__cause__ or error
        raise ValueError(f"{shown}: cannot read this file: {type(cause).__name__}: {cause}") from error


def datasets_cache() -> str:
    """Return the folder in which `datasets` keeps what it has converted."""
    import datasets

    return str(datasets.config.HF_DATASETS_CACHE)


def is_saved(folder: Path) -> bool:
    """Return whether a folder was written by `save_to_disk`: a dataset, or several as splits."""
    alone = ("state.json", "dataset_info.json")
    return (folder / "dataset_dict.json").is_file() or all((folder / name).is_file() for name in alone)


def load_saved(folder: Path) -> dict[str, Any]:
    """Return the datasets of a folder of `save_to_disk` by split; one alone is `train` if it does not say."""
    import datasets

    refuse_elsewhere(folder)
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise ValueError(f"{folder}: cannot read this dataset: {type(error).__name__}: {error}") from error
    return dict(found) if isinstance(found, datasets.DatasetDict) else {str(found.split or "train"): found}


def refuse_elsewhere(folder: Path) -> None:
    """Raise ValueError if the records in a folder of `save_to_disk` name files outside of it, maybe private ones."""
    splits = read_json(folder / "dataset_dict.json").get("splits") or []
    for inner in (folder, *(folder / plain_name(str(split), folder) for split in splits)):
        for entry in read_json(inner / "state.json").get("_data_files") or []:
            plain_name(str(entry.get("filename") if isinstance(entry, dict) else entry), inner)


def plain_name(name: str, folder: Path) -> str:
    """Return a name that a folder's record has for a file. Raises: ValueError if it leads out of the folder."""
    if Path(name).name != name or name == ".." or "\\" in name:
        raise ValueError(f"{folder}: it names {name!r}, and the files of a dataset lie in its own folder")
    return name
