"""The benchmark of generation: every contender goes on with a text, and what is measured arrives in file and tables."""

from __future__ import annotations

import json
from pathlib import Path

import generation
import pytest
import torch
from generation_peers import GENERATORS, NextTokens, build, in_silence
from machine import ROOT
from training_peers import Sizes

SMALL = Sizes(tokens=128, hidden_size=32, depth=2, heads=4, vocab_size=50)
FLAGS = (
    "--hidden_size 32 --heads 4 --depth 1 --vocab_size 50 --prompt 20 --new_tokens 4 --contexts 16 32 --steps 16 "
    "--repetitions 2 --batch 3 --contenders ours gpt2"
).split()


@pytest.mark.parametrize("name", list(GENERATORS))
def test_every_contender_goes_on_with_a_text(name: str) -> None:
    if name == "reformer_pytorch":
        pytest.importorskip("reformer_pytorch")
    model = build(name, SMALL, "cpu", torch.float32)
    prompt = torch.randint(2, 50, (2, 24), generator=torch.Generator().manual_seed(0))
    with in_silence(), torch.no_grad():
        new = GENERATORS[name].generate(model, prompt, 5)
    assert new.shape == (2, 5) and int(new.min()) >= 0 and int(new.max()) < 50


@pytest.mark.parametrize("name", ["ours", "gpt2"])
def test_next_tokens_are_those_of_generate(name: str) -> None:
    model = build(name, SMALL, "cpu", torch.float32)
    reader = NextTokens(model, 30, "cpu")
    tokens = torch.randint(50, (1, 31), generator=torch.Generator().manual_seed(0))
    with in_silence(), torch.no_grad():
        expected = GENERATORS[name].generate(model, tokens, 4)[0].tolist()
    found = []
    for _ in range(4):
        reader.step()
        found.append(int(reader.next))
    assert found == expected
    assert reader.cache_bytes() > 0


def test_results_go_into_file_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "generation.json")]
    generation.main([*FLAGS, *out])
    results = json.loads((tmp_path / "generation.json").read_text(encoding="utf-8"))
    for part, batch in (("throughput", 1), ("batch", 3)):
        entry = results[part]["contenders"]["ours"]
        assert entry["tokens_per_second"] == pytest.approx(batch * 4 / entry["median_s"])
    rows = results["latency"]["rows"]
    assert {(row["contender"], row["context"]) for row in rows} == {(n, c) for n in ("ours", "gpt2") for c in (16, 32)}
    assert all(len(row["seconds"]) == row["samples"] == 14 for row in rows)
    assert [(row["context"], row["batch"]) for row in results["together"]["rows"]] == [(20, 1), (20, 3)] * 2
    # What is there is not measured again.
    generation.main([*FLAGS, *out])
    assert json.loads((tmp_path / "generation.json").read_text(encoding="utf-8")) == results
    capsys.readouterr()
    generation.main(["--report", *out])
    tables = capsys.readouterr().out
    speeds = {name: results["batch"]["contenders"][name]["tokens_per_second"] for name in ("ours", "gpt2")}
    assert f"| {speeds['ours'] / speeds['gpt2']:.1f}x |" in tables
    assert "one text and 3 at a time" in tables and "| 32 | " in tables


def test_the_page_shows_the_result_files() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for path in (ROOT / "benchmarks" / "results").glob("generation_*.json"):
        assert generation.report(json.loads(path.read_text(encoding="utf-8"))).strip() in page, path.name
