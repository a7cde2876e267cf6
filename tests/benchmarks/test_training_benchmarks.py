"""The benchmarks of whole training steps: every contender trains, and what is measured arrives in file and tables."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType

import memory
import pytest
import torch
import train_step
from machine import ROOT
from training_peers import CONTENDERS, Sizes, Trainee

SMALL = Sizes(tokens=256, hidden_size=32, depth=2, heads=4, vocab_size=50)
FLAGS = "--hidden_size 32 --heads 4 --vocab_size 50".split()


# Compiling takes most of a minute.
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in CONTENDERS if name.endswith("compiled")]


@pytest.mark.parametrize("name", [*(name for name in CONTENDERS if not name.endswith("compiled")), *SLOW])
def test_every_contender_learns_its_tokens(name: str) -> None:
    if name == "reformer_pytorch":
        pytest.importorskip("reformer_pytorch")
    trainee = Trainee(name, SMALL)
    first = trainee.step(update=True)
    assert abs(first - math.log(SMALL.vocab_size)) < 1.0
    for group in trainee.optimizer.param_groups:
        group["lr"] = 3e-3
    for _ in range(10):
        last = trainee.step(update=True)
    assert last < first - 0.1


def test_all_our_modes_compute_the_same_loss() -> None:
    losses = {name: Trainee(name, SMALL).step() for name in ("ours", "keep_attention", "off")}
    assert max(losses.values()) - min(losses.values()) < 1e-5


def test_contenders_are_of_one_size() -> None:
    counts = {}
    for name in ("ours", "gpt2"):
        model = Trainee(name, SMALL).model
        embeddings = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding))
        counts[name] = sum(p.numel() for p in model.parameters()) - embeddings
    assert counts["ours"] == pytest.approx(counts["gpt2"], rel=0.15)


def test_memory_goes_into_file_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "memory.json")]
    arguments = ["--tokens", "4096", "--depths", "2", "--contenders", "ours", "--repetitions", "1", *FLAGS, *out]
    memory.main(arguments)
    first = json.loads((tmp_path / "memory.json").read_text(encoding="utf-8"))
    (row,) = first["rows"]
    assert row["contender"] == "ours" and row["depth"] == 2 and row["samples"] == [row["bytes"]]
    assert 0 < row["bytes"] < row["resident_bytes"]
    assert abs(row["loss"] - math.log(50)) < 1.0
    # What is there is not measured again.
    memory.main(arguments)
    assert json.loads((tmp_path / "memory.json").read_text(encoding="utf-8")) == first
    capsys.readouterr()
    memory.main(["--report", *out])
    assert f"| ours | {row['bytes'] / 2**20:,.0f} |" in capsys.readouterr().out


def test_step_times_go_into_file_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "steps.json")]
    arguments = "--lengths 128 256 --depth 1 --contenders ours ours_bf16 gpt2 --repetitions 2".split() + [*FLAGS, *out]
    train_step.main(arguments)
    groups = json.loads((tmp_path / "steps.json").read_text(encoding="utf-8"))["groups"]
    assert [group["tokens"] for group in groups] == [128, 256]
    assert all(len(entry["seconds"]) == 2 for group in groups for entry in group["contenders"].values())
    capsys.readouterr()
    train_step.main(["--report", *out])
    tables = capsys.readouterr().out
    median = groups[1]["contenders"]["gpt2"]["median_s"]
    ratio = median / groups[1]["contenders"]["ours"]["median_s"]
    assert f"| GPT-2 (SDPA) | {median:.2f} s | {256 / median:,.0f} | {ratio:.2f}x |" in tables
    assert "| ours, bf16 autocast | " in tables


@pytest.mark.parametrize("script", [memory, train_step], ids=["memory", "train_step"])
def test_the_page_shows_the_result_files(script: ModuleType) -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for path in (ROOT / "benchmarks" / "results").glob(f"{script.__name__}_*.json"):
        assert script.report(json.loads(path.read_text(encoding="utf-8"))).strip() in page, path.name
