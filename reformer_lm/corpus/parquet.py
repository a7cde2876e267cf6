"""Read one text column of a Parquet file, a batch of rows at a time."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reformer_lm.corpus.files import OnBytes, ignore_bytes, open_file
from reformer_lm.errors import InputError

BATCH_ROWS = 256
BUFFER_BYTES = 1 << 20


def read_parquet(path: Path, field: str, on_bytes: OnBytes = ignore_bytes) -> Iterator[str]:
    """Iterate over the strings of a column.

    Args:
        path: The file.
        field: The column.
        on_bytes: Told how far into the file the rows are, as a share of its bytes.

    Raises:
        InputError: If pyarrow is not installed (at once), or the file is damaged, or the column is missing, no
            text or has an empty place.
    """
    try:
        arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise InputError(f"{path}: Parquet needs pyarrow, which is not installed; pip install pyarrow") from None
    open_file(path).close()
    return _read_column(arrow, parquet, path, field, on_bytes)


def _read_column(arrow: Any, parquet: Any, path: Path, field: str, on_bytes: OnBytes) -> Iterator[str]:
    size = path.stat().st_size
    number = told = 0
    try:
        # Without the buffer, and with the library's prefetching, whole row groups would be in memory.
        with parquet.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
            _require_text(arrow, file.schema_arrow, path, field)
            rows = file.metadata.num_rows
            for batch in file.iter_batches(BATCH_ROWS, columns=[field]):
                for article in batch.column(0).to_pylist():
                    number += 1
                    if article is None:
                        raise InputError(f"{path}: row {number} has no {field!r}; leave such rows out")
                    yield article
                on_bytes(size * number // rows - told)
                told = size * number // rows
    # Its own errors are ValueErrors and OSErrors, so that an InputError (a ValueError, too) must go by first.
    except InputError:
        raise
    except (arrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: no Parquet file that can be read ({reason}); write it anew") from None


def _require_text(arrow: Any, schema: Any, path: Path, field: str) -> None:
    if field not in schema.names:
        columns = ", ".join(schema.names)
        raise InputError(f"{path}: has no column {field!r} but {columns}; name the text's with --text_field")
    kind = schema.field(field).type
    if arrow.types.is_dictionary(kind):
        kind = kind.value_type
    if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind) or arrow.types.is_string_view(kind)):
        raise InputError(f"{path}: column {field!r} holds {kind}, not text; name the text's with --text_field")
