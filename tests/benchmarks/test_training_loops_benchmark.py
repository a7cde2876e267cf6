"""The benchmark of training loops: all contenders train, and what is measured arrives in file and table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import training
from machine import ROOT


def test_results_go_into_file_and_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, out = tmp_path / "articles.json", tmp_path / "training.json"
    corpus.write_text(json.dumps(["春天来了，花开了。" * 500]), encoding="utf-8")
    monkeypatch.setattr(training, "TOKENS", 128)
    counts = "--steps 3 --peer_steps 1 --repetitions 2 --contenders bare ours gpt2_chinese".split()
    monkeypatch.setattr(sys, "argv", ["training.py", "--corpus", str(corpus), "--out", str(out), *counts])
    training.main()
    results = json.loads(out.read_text(encoding="utf-8"))
    assert results["tokens"] == 128
    assert {name: entry["steps"] for name, entry in results["contenders"].items()} == {
        "bare": 3, "ours": 3, "gpt2_chinese": 1,
    }  # fmt: skip
    for entry in results["contenders"].values():
        assert [count * seconds for count, seconds in zip(entry["tokens_per_s"], entry["seconds"], strict=True)] == (
            pytest.approx([entry["steps"] * 128] * 2)
        )
    assert len(results["share_of_the_loop"]) == 2
    assert all(0 < share < 1 for share in results["share_of_the_loop"])
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["training.py", "--report", "--out", str(out)])
    training.main()
    assert capsys.readouterr().out.strip() == training.report(results)


def test_the_page_shows_the_result_files() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for path in (ROOT / "benchmarks" / "results").glob("training_*.json"):
        assert training.report(json.loads(path.read_text(encoding="utf-8"))) in page, path.name
