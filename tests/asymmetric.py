"""Fixtures that are lopsided on purpose, each named for the mistake that a symmetric one lets through."""

from pathlib import Path
from typing import Any

# Rows that cannot be used, at both sides of the first block's end and in the last, shorter block.
BAD_ROWS = (998, 1000, 1001, 2400)


def rows_over_every_block(num: int = 2500, bad: tuple[int, ...] = BAD_ROWS) -> list[dict[str, Any]]:
    """Return questions that fill two and a half blocks, each with its own number in it, so that none may be lost.

    Breaks: a row dropped where one block ends, a bad row that shifts those behind it, an id or reference of another.
    """
    rows: list[dict[str, Any]] = []
    for i in range(num):
        answers = [f"a{i}", f"b{i}", "c"][: 1 + i % 3]
        row = {"context": f"Passage {i // 7}.", "question": f"Which is {i}?", "answers": {"text": answers}}
        rows.append({**row, "id": f"own{i}" if i % 3 == 0 else None})
    for i in bad:
        rows[i]["answers"] = {"text": [" "]}
    return rows


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
    return path
