"""The benchmark of the duplication task: its strings, its modes, its file and its tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import duplication
import pytest
import torch
from machine import ROOT

TINY = replace(duplication.SHORT, word=7, vocab_size=9, bucket_size=4, hidden_size=16, steps=2, batch=4, tests=8)
FLAGS = "--word 7 --vocab_size 9 --bucket_size 4 --hidden_size 16 --steps 2 --batch 4 --tests 8 --device cpu".split()


def test_strings_are_repeated_and_only_the_repetition_counts() -> None:
    tokens = duplication.sequences(50, TINY, torch.Generator().manual_seed(0))
    assert tokens.shape == (50, 16) and TINY.length == 16
    assert torch.equal(tokens[:, :8], tokens[:, 8:])
    assert (tokens[:, 0] == 0).all() and tokens[:, 1:8].min() == 1 and tokens[:, 1:8].max() == 8
    batch = next(duplication.batches(TINY))
    counted = batch["labels"] != -100
    assert counted.sum(1).tolist() == [7] * 4
    assert torch.equal(batch["labels"][counted], batch["input_ids"][:, 9:].flatten())


def test_the_papers_sizes_are_those_of_the_paper() -> None:
    full = duplication.FULL
    assert (full.word, full.length, full.vocab_size, full.hidden_size, full.steps) == (511, 1024, 128, 256, 150_000)


@pytest.mark.parametrize("mode", list(duplication.MODES))
@pytest.mark.parametrize("attention", duplication.EVALUATED)
def test_weights_are_judged_with_the_attention_that_is_named(mode: str, attention: str) -> None:
    torch.manual_seed(0)
    model = duplication.build(mode, "1", TINY).eval()
    found = duplication.evaluate(model, mode, attention, TINY)
    # By hand, through a model made for that attention.
    other = duplication.build(mode, attention, TINY).eval()
    other.load_state_dict(model.state_dict())
    assert other.config.num_hashes == (1 if attention == "full" else int(attention))
    tokens = duplication.sequences(8, TINY, torch.Generator().manual_seed(duplication.TEST_SEED))
    with torch.no_grad():
        logits = other(tokens).logits
    losses = [-float(logits[b, t - 1].log_softmax(-1)[tokens[b, t]]) for b in range(8) for t in range(9, 16)]
    right = [float(logits[b, t - 1].argmax() == tokens[b, t]) for b in range(8) for t in range(9, 16)]
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found["accuracy"] == pytest.approx(sum(right) / len(right))


def test_full_attention_is_one_model_in_both_modes_without_shift() -> None:
    torch.manual_seed(0)
    model = duplication.build("causal", "full", TINY).eval()
    found = [duplication.evaluate(model, mode, "full", TINY) for mode in duplication.MODES]
    assert found[1] == found[2] != found[0]


def test_results_go_into_file_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "duplication.json"
    arguments = [*FLAGS, "--trained", "full", "1", "--out", str(out)]
    duplication.main(arguments)
    table = capsys.readouterr().out
    results = json.loads(out.read_text(encoding="utf-8"))
    made = {(entry["mode"], entry["trained"]) for entry in results["runs"]}
    assert made == {(mode, trained) for mode in duplication.MODES for trained in ("full", "1")}
    causal, chunked = (
        next(e for e in results["runs"] if (e["mode"], e["trained"]) == (mode, "full"))
        for mode in ("causal", "chunked")
    )
    assert causal["training_curve"] == chunked["training_curve"]
    for entry in results["runs"]:
        assert set(entry["evaluated"]) == set(duplication.EVALUATED)
        assert entry["commit"] and entry["steps"] == 2
        cells = [f"{100 * r['accuracy']:.1f} ({r['loss']:.2f})" for r in entry["evaluated"].values()]
        assert " | ".join(cells) in table
    # What is there is not trained again.
    duplication.main(arguments)
    assert json.loads(out.read_text(encoding="utf-8")) == results
    with pytest.raises(SystemExit):
        duplication.main(["--report", "--out", str(tmp_path / "none.json")])


def test_the_page_shows_the_result_files() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    files = list((ROOT / "benchmarks" / "results").glob("duplication_*.json"))
    assert files
    for path in files:
        assert duplication.report(json.loads(path.read_text(encoding="utf-8"))) in page, path.name
