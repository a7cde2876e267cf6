"""What a run measured, as JSON lines: one object for each report, in a file that any tool can read."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from reformer_lm.training.occupancy import BucketSizes

METRICS_NAME = "metrics.jsonl"

# Half a character, which an argument or a file's name can hold and UTF-8 cannot: "\\udc80" is JSON for it.
_SURROGATES = "backslashreplace"


@dataclass(frozen=True)
class Entry:
    """What was measured at one moment.

    Attributes:
        step: Steps done.
        values: Numbers by name.
        texts: Texts by name.
        buckets: By name, how many buckets hold how many tokens.
        time: Seconds since 1970.
    """

    step: int
    values: Mapping[str, float] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    buckets: Mapping[str, BucketSizes] = field(default_factory=dict)
    time: float = field(default_factory=time.time)

    def to_json(self) -> str:
        """One line: step, time, and each value under its name; null where JSON has no such number."""
        values = {name: value if math.isfinite(value) else None for name, value in self.values.items()}
        # Pairs, since the keys of an object would be strings.
        buckets = {name: sorted(sizes.items()) for name, sizes in self.buckets.items()}
        content = {"step": self.step, "time": round(self.time, 3), **values, **self.texts, **buckets}
        return json.dumps(content, ensure_ascii=False, allow_nan=False)


class MetricsFile:
    """Appends entries to a file of JSON lines.

    Each line reaches the operating system before the next step, so a killed process loses none that it wrote.

    Args:
        path: Of the file.
        resumed_at: Step at which a run goes on: what the file holds beyond it, from a run that was killed after its
            last checkpoint, is dropped. None for a new run, which replaces the file.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(self, path: Path, resumed_at: int | None = None) -> None:
        kept = [] if resumed_at is None else [line for line in read_metrics(path) if line["step"] <= resumed_at]
        replace_file(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
        self._file: TextIO = path.open("a", encoding="utf-8", errors=_SURROGATES, newline="\n")

    def write(self, entry: Entry) -> None:
        """Append a line."""
        self._file.write(entry.to_json() + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, in order; none if there is no such file.

    A line that is no JSON object with a step is left out: it is the last one of a run that was killed as it wrote.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    read = []
    for line in lines:
        try:
            # Bytes, because half a line can end within a character.
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict) and isinstance(content.get("step"), int):
            read.append(content)
    return read


def replace_file(path: Path, text: str) -> None:
    """Write a file that is whole or as it was before."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", errors=_SURROGATES, newline="\n")
    partial.replace(path)
