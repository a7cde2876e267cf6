"""The metrics file: one JSON object a line, without gaps or doubles after a resume, readable after a kill."""

import json
import math
from pathlib import Path

import pytest

from reformer_lm.training.metrics import Entry, MetricsFile, read_metrics


def write(path: Path, *entries: Entry, resumed_at: int | None = None) -> None:
    file = MetricsFile(path, resumed_at)
    for entry in entries:
        file.write(entry)
    file.close()


def test_each_entry_is_a_json_object_on_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(
        path,
        Entry(0, {"validation/loss": 5.5, "validation/perplexity": math.inf}, time=1.5),
        Entry(7, {"train/loss": 0.1}, {"sample": "春\n<花>\u2028"}, {"buckets/layer_0": {3: 2, 0: 1}}, time=2.0),
    )
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n") and "春" in text
    assert [json.loads(line) for line in text.removesuffix("\n").split("\n")] == [
        {"step": 0, "time": 1.5, "validation/loss": 5.5, "validation/perplexity": None},
        {"step": 7, "time": 2.0, "train/loss": 0.1, "sample": "春\n<花>\u2028", "buckets/layer_0": [[0, 1], [3, 2]]},
    ]


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_half_written_last_line_breaks_nothing(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "m.jsonl"
    write(path, Entry(1, {"x": 1.0}, time=1), Entry(2, texts={"sample": "春天里的花"}, time=2))
    path.write_bytes(path.read_bytes()[:-cut])
    steps = [line["step"] for line in read_metrics(path)]
    # The line's end alone carries nothing.
    assert steps == ([1, 2] if cut == 1 else [1])
    write(path, Entry(2, {"x": 2.0}, time=3), resumed_at=1)
    assert [(line["step"], line["x"]) for line in read_metrics(path)] == [(1, 1.0), (2, 2.0)]
    assert path.read_bytes().count(b"\n") == 2


def test_a_resumed_run_drops_what_lies_beyond_and_a_new_one_everything(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, *(Entry(step, {"x": float(step)}, time=step) for step in (0, 10, 20, 25, 30)))
    write(path, Entry(30, {"x": -1.0}), resumed_at=25)
    assert [(line["step"], line["x"]) for line in read_metrics(path)] == [
        (0, 0),
        (10, 10),
        (20, 20),
        (25, 25),
        (30, -1),
    ]
    write(path, Entry(5))
    assert [line["step"] for line in read_metrics(path)] == [5]
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.jsonl"]


def test_lines_arrive_before_the_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    file = MetricsFile(path)
    file.write(Entry(1))
    assert [line["step"] for line in read_metrics(path)] == [1]
    file.close()


def test_half_a_character_is_written_as_json_does(tmp_path: Path) -> None:
    write(tmp_path / "m.jsonl", Entry(1, texts={"sample": "a\udc80"}))
    assert read_metrics(tmp_path / "m.jsonl")[0]["sample"] == "a\udc80"


def test_foreign_lines_and_a_missing_file_are_no_measurements(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    assert read_metrics(path) == []
    path.write_bytes(b'[1]\n\n{"step": "1"}\n{"a": 1}\n\0\0\0\n{"step": 3}\n')
    assert read_metrics(path) == [{"step": 3}]
