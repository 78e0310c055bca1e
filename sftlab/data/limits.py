"""Limits on what data may cost: how far a file may inflate, how long a row may be and its chat template may run.

A row over a limit is a bad row (named, and skipped with data.on_error=skip). A file that inflates beyond every honest
ratio is refused as a whole, before it fills memory or disk.
"""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

ROW_BYTES = 64 << 20  # of one line of JSON
TEMPLATE_S = 10.0  # for one row's chat template
INFLATED_RATIO = 200  # decompressed bytes per stored byte; repetitive text reaches 50, a bomb 1,000 and more
INFLATED_BYTES = 256 << 20  # a file may always inflate to so much


def most_inflated(path: Path) -> int:
    """Return how many bytes a compressed file may become."""
    return max(INFLATED_BYTES, INFLATED_RATIO * path.stat().st_size)


def inflates(path: Path) -> ValueError:
    """Return the error for a file that becomes more than that."""
    return ValueError(
        f"{path}: {path.stat().st_size:,} bytes inflate to more than {most_inflated(path):,} "
        f"({INFLATED_RATIO} times, or {INFLATED_BYTES >> 20} MiB): it looks like a decompression bomb. If you trust "
        "it, store it with less compression (gunzip; Parquet without a dictionary)"
    )


def read_line(file: BinaryIO, most: float = float("inf")) -> tuple[bytes, int]:
    """Return the next line and its length; of a line over ROW_BYTES only the beginning, which is longer than that.

    A line that is longer than `most` is not read to its end.
    """
    line = file.readline(ROW_BYTES + 1)
    length, more = len(line), line
    while len(line) > ROW_BYTES and more and not more.endswith(b"\n") and length <= most:
        more = file.readline(1 << 20)
        length += len(more)
    return line, length


def lines(file: BinaryIO, path: Path) -> Iterator[tuple[bytes, int]]:
    """Yield what `read_line` returns until the file ends. Raises: ValueError if it inflates too far."""
    most, total = most_inflated(path), 0
    while True:
        line, length = read_line(file, most - total)
        if not line:
            return
        total += length
        if total > most:
            raise inflates(path)
        yield line, length


def whole(file: BinaryIO, path: Path) -> bytes:
    """Return all bytes of a file. Raises: ValueError if a compressed one inflates too far."""
    most = most_inflated(path)
    parts, total = [], 0
    while part := file.read(1 << 24):
        parts.append(part)
        total += len(part)
        if total > most:
            raise inflates(path)
    return b"".join(parts)


def refuse_gzip_bomb(path: Path) -> None:
    """Raise ValueError if a .gz inflates too far; for readers that take a path."""
    if path.suffix != ".gz":
        return
    most, total = most_inflated(path), 0
    with path.open("rb") as file:
        inflater = zlib.decompressobj(31)
        while chunk := file.read(1 << 16):
            while chunk:
                total += len(inflater.decompress(chunk, 1 << 24))
                if total > most:
                    raise inflates(path)
                chunk = inflater.unconsumed_tail
                if inflater.eof:  # a .gz may hold several members
                    chunk, inflater = inflater.unused_data, zlib.decompressobj(31)


def refuse_parquet_bomb(path: Path) -> None:
    """Raise ValueError if a Parquet file becomes too large in memory, by its codec or by its dictionaries.

    The codec's output is in the metadata, and readers check it. A dictionary's is not: one value of a megabyte may
    stand in a million rows. The longest value times the rows is a bound that honest files keep (10 ms for SQuAD); only
    columns that exceed it are looked through, as indices without their values.
    """
    import pyarrow.parquet as pq

    most = most_inflated(path)
    try:
        with pq.ParquetFile(path) as file:
            meta = file.metadata
    except (OSError, ValueError):
        return  # whoever reads it will say what is wrong with it
    groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
    if sum(group.total_byte_size for group in groups) > most:
        raise inflates(path)
    suspects = []
    for i in range(meta.num_columns):
        chunks = [group.column(i) for group in groups]
        coded = [c.has_dictionary_page and c.physical_type == "BYTE_ARRAY" for c in chunks]
        name = meta.schema.column(i).path
        if (
            sum(c.num_values * c.total_uncompressed_size for c, is_coded in zip(chunks, coded, strict=True) if is_coded)
            > most
        ):
            longest = [_longest_value(path, name, g) if is_coded else 0 for g, is_coded in enumerate(coded)]
            if sum(c.num_values * n for c, n in zip(chunks, longest, strict=True)) > most:
                suspects.append(name)
    if suspects and _dictionary_bytes(path, suspects, most) > most:
        raise inflates(path)


def _longest_value(path: Path, column: str, group: int) -> int:
    """Return the length of the longest value in the dictionary of a column in a row group: one row brings it all."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, read_dictionary=[column]) as file:
        batch = next(file.iter_batches(batch_size=1, row_groups=[group], columns=[column]), None)
    found = _dictionary_of(batch.column(0)) if batch is not None and batch.num_columns else None
    return 1 << 62 if found is None else int(pc.max(pc.binary_length(found)).as_py() or 0)


def _dictionary_of(array: Any) -> Any:
    """Return the dictionary in an array, through lists and structs; None if there is none."""
    import pyarrow as pa

    if isinstance(array, pa.DictionaryArray):
        return array.dictionary
    if isinstance(array, pa.StructArray):
        return next((d for d in map(_dictionary_of, array.flatten()) if d is not None), None)
    return _dictionary_of(array.flatten()) if pa.types.is_nested(array.type) else None


def _dictionary_bytes(path: Path, columns: list[str], most: int) -> int:
    """Return how many bytes columns hold once every index is replaced by its value; more than `most` is enough."""
    import pyarrow.parquet as pq

    total = 0
    with pq.ParquetFile(path, read_dictionary=columns) as file:
        for batch in file.iter_batches(batch_size=1 << 14, columns=columns):
            for array in batch.columns:
                total += _referred_bytes(array)
            if total > most:
                break
    return total


def _referred_bytes(array: Any) -> int:
    """Return the bytes of the values that an array refers to, through lists, structs and dictionaries."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(array, pa.DictionaryArray):
        lengths = pc.binary_length(array.dictionary).cast(pa.int64())
        return int(pc.sum(lengths.take(array.indices)).as_py() or 0)
    if isinstance(array, pa.StructArray):
        return sum(_referred_bytes(field) for field in array.flatten())
    if hasattr(array, "flatten") and pa.types.is_nested(array.type):
        return _referred_bytes(array.flatten())
    return int(array.nbytes)
