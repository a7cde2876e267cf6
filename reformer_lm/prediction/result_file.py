"""--output: results of any number of texts in a file, which an interrupted run leaves such that it can go on.

While texts are scored, results are JSON lines in ``<output>.partial``, whose first line says what they are the results
of. At the end they are put into the asked format and order under another name, which then becomes the output's: what
stood there before is replaced whole or not at all.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from reformer_lm.errors import InputError
from reformer_lm.prediction.reports import score_record, to_json
from reformer_lm.scoring import Score, ScoreTotals

OUTPUT_FORMATS = (".jsonl", ".csv", ".tsv")
# Of a table; the JSON lines may have the tokens besides.
COLUMNS = (
    "index", "text", "ppl", "nll", "tokens", "unknown", "characters", "ppl_per_character", "bits_per_character",
    "bits_per_byte",
)  # fmt: skip
# Written as spaces in a .tsv, which has no way to quote them.
_TSV_BREAKS = str.maketrans("\t\r\n", "   ")


def identify(texts: Sequence[str], file: str | None, model_dir: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """What results depend on, so that those of two runs can be told apart.

    Args:
        texts: Values of --text.
        file: Value of --file.
        model_dir: The model's folder; its files are known by size and time.
        options: Everything else that results depend on.

    Returns:
        Plain values for a JSON line.
    """
    parts = [path for path in sorted(model_dir.iterdir()) if path.suffix in (".json", ".safetensors")]
    return {
        "texts": hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:16],
        "file": None if file is None else [str(Path(file).resolve()), *_size_and_time(Path(file))],
        "model": [[path.name, *_size_and_time(path)] for path in parts],
        "options": dict(options),
    }


def _size_and_time(path: Path) -> list[int]:
    try:
        found = path.stat()
    except OSError:
        # Reading it says what is wrong.
        return []
    return [found.st_size, found.st_mtime_ns]


def require_output(path: Path) -> None:
    """Object to an output that cannot be written, before anything costs time.

    Raises:
        InputError: If the ending means no format, or the folder is missing.
    """
    if path.suffix.lower() not in OUTPUT_FORMATS:
        raise InputError(f"--output {path}: unknown format {path.suffix!r}; give a .jsonl, .csv or .tsv file")
    if path.is_dir():
        raise InputError(f"--output {path}: this is a folder; give a file")
    if not path.parent.is_dir():
        raise InputError(f"--output {path}: there is no folder {path.parent}; make it first")


class ResultFile:
    """The results of one run.

    Args:
        path: Of the output.
        identity: From `identify`; None for texts that cannot be read twice: then nothing is taken over.

    Attributes:
        totals: Over all results, those of the interrupted run included.
        taken_over: How many results an interrupted run has left.

    Raises:
        InputError: If there are results of another run, or the file cannot be written.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any] | None) -> None:
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self.totals = ScoreTotals()
        self.taken_over = 0
        try:
            if identity is not None and self._partial.exists():
                end = self._take_over(identity)
                self._file: BinaryIO = self._partial.open("r+b")
                self._file.truncate(end)
                self._file.seek(end)
            else:
                self._file = self._partial.open("wb")
                self._file.write(to_json({"identity": identity}).encode() + b"\n")
        except OSError as error:
            raise InputError(f"--output {path}: cannot be written ({error.strerror}); give another file") from None

    def _take_over(self, identity: Mapping[str, Any]) -> int:
        """Count what is there; returns where its last whole line ends."""
        with self._partial.open("rb") as file:
            header = file.readline()
            try:
                written = json.loads(header)["identity"]
            except (ValueError, KeyError, TypeError):
                written = None
            if written != identity:
                other = written if isinstance(written, dict) else {}
                names = [name for name in identity if other.get(name) != identity[name]]
                raise InputError(
                    f"{self._partial}: results of another run are there (other {', '.join(names)}); "
                    "delete the file, or give another --output"
                )
            end = file.tell()
            for line in file:
                try:
                    record = json.loads(line)
                except ValueError:
                    break
                if not line.endswith(b"\n"):
                    break
                self.totals.add_record(record)
                self.taken_over += 1
                end += len(line)
        return end

    def write(self, score: Score, explanation: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Add the result of the next text.

        Args:
            score: The result.
            explanation: Of its tokens, for JSON lines.

        Raises:
            InputError: If the disk is full; what was written before stays.
        """
        record = score_record(score, index=self.totals.texts)
        if explanation is not None:
            record["explanation"] = list(explanation)
        try:
            self._file.write(to_json(record).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise InputError(
                f"{self._partial}: cannot be written ({error.strerror}); the results so far stay there, and the same "
                "command goes on with them"
            ) from None
        self.totals.add(score)

    def finish(self, keep: Callable[[float], bool], sort: str | None) -> int:
        """Put the results under the output's name.

        Args:
            keep: Of a perplexity, whether its text is written.
            sort: "ascending" or "descending" by perplexity, None for the texts' order.

        Returns:
            How many were written.

        Raises:
            InputError: If the disk is full; the results stay in the partial file.
        """
        self._file.close()
        finished = self._path.with_name(self._path.name + ".finished")
        count = 0
        try:
            with (
                self._partial.open("rb") as source,
                finished.open("w", encoding="utf-8", errors="replace", newline="") as target,
            ):
                add = _row_writer(target, self._path.suffix.lower())
                for line in _chosen(source, keep, sort):
                    add(line)
                    count += 1
            finished.replace(self._path)
        except OSError as error:
            raise InputError(
                f"--output {self._path}: cannot be written ({error.strerror}); "
                f"the results stay in {self._partial}, and the same command goes on with them"
            ) from None
        self._partial.unlink()
        return count


def _chosen(source: BinaryIO, keep: Callable[[float], bool], sort: str | None) -> Iterator[bytes]:
    """The lines to write, in their order; of what is sorted only places are in memory."""
    source.readline()
    places: list[tuple[float, int]] = []
    while line := source.readline():
        value = json.loads(line)["ppl"]
        perplexity = math.nan if value is None else float(value)
        if not keep(perplexity):
            continue
        if sort is None:
            yield line
        else:
            places.append((sort_key(perplexity, sort), source.tell() - len(line)))
    for _, place in sorted(places):
        source.seek(place)
        yield source.readline()


def sort_key(perplexity: float, sort: str) -> float:
    """A number by which perplexities stand in the asked order, texts without one (nan) at the end."""
    if math.isnan(perplexity):
        return math.inf
    return perplexity if sort == "ascending" else -perplexity


def _row_writer(file: TextIO, kind: str) -> Callable[[bytes], None]:
    if kind == ".jsonl":

        def add_line(line: bytes) -> None:
            file.write(line.decode())

        return add_line
    table = csv.writer(file, lineterminator="\n") if kind == ".csv" else None

    def add_cells(cells: Sequence[Any]) -> None:
        shown = ["" if cell is None else cell for cell in cells]
        if table is not None:
            table.writerow(shown)
        else:
            file.write("\t".join(str(cell).translate(_TSV_BREAKS) for cell in shown) + "\n")

    add_cells(COLUMNS)

    def add_record(line: bytes) -> None:
        record = json.loads(line)
        add_cells([record[name] for name in COLUMNS])

    return add_record
