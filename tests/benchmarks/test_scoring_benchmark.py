"""The benchmarks of scoring and of optimizers: what is measured arrives in file and tables, and on the page."""

from __future__ import annotations

import json
from pathlib import Path

import optimizers
import pytest
import scoring
import scoring_ways
import torch
from damage import KINDS, damaged
from machine import ROOT

from reformer_lm import ReformerLMConfig, ReformerLMForCausalLM
from reformer_lm.scoring import score
from reformer_lm.text import load_tokenizer

SENTENCES = ["春天来了，花开了，燕子飞回来了。", "他把门轻轻关上，走进了雨里。", "老人坐在河边钓鱼。"]


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    path = tmp_path / "sentences.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES), encoding="utf-8")
    return path


def test_speed_memory_and_accuracy_go_into_one_file(
    sentences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("reformer_pytorch")
    monkeypatch.setattr(scoring, "TIMES", 2)
    monkeypatch.setattr(scoring, "WAYS_TIMES", 1)
    tokenizer = load_tokenizer()
    config = ReformerLMConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    ReformerLMForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    given = ["--sentences", str(sentences), "--out", str(tmp_path / "scoring.json")]
    scoring.main(["speed", *given, "--repetitions", "1", "--peer_sentences", "2"])
    scoring.main(["ways", *given, "--repetitions", "1"])
    scoring.main(["memory", *given, "--counts", "5"])
    scoring.main(["accuracy", *given, "--models", f"b={tmp_path / 'model'}"])
    results = json.loads((tmp_path / "scoring.json").read_text(encoding="utf-8"))
    assert set(results["speed"]) == set(scoring.SPEED_LABELS)
    assert results["speed"]["ours"]["sentences"] == 2 * len(SENTENCES)
    assert [(row["sentences"], row["tokens"]) for row in results["memory"]] == [(5, 2 * 16 + 2 * 14 + 9)]
    assert set(results["machines"]) == {"speed", "ways", "memory", "accuracy"}
    assert set(results["ways"]["per_second"]) == {*scoring_ways.WAYS, *scoring_ways.BOUNDS}
    in_bfloat16 = results["accuracy"]["b"]["bfloat16"]
    assert 0 < in_bfloat16["median_change"] <= in_bfloat16["largest_change"] < 0.1
    for entry in results["accuracy"]["b"]["kinds"].values():
        assert 0 <= entry["right_by_likelihood"] <= entry["pairs"] == len(SENTENCES)
    capsys.readouterr()
    scoring.main(["report", *given[2:]])
    table = capsys.readouterr().out
    assert all(name in table for name in (*scoring.SPEED_LABELS.values(), *KINDS.values()))


def test_each_way_gives_the_same_scores() -> None:
    tokenizer = load_tokenizer()
    model = scoring_ways.our_model(tokenizer)
    expected = [result.nll for result in score(model, tokenizer, SENTENCES)]
    for name, (_, patches, options, dtype) in scoring_ways.WAYS.items():
        with scoring_ways.patched(patches):
            found = [r.nll for r in score(model.to(dtype), tokenizer, SENTENCES, **options)]
        assert found == pytest.approx(expected, rel=1e-6 if dtype == torch.float32 else 0.01), name


def test_damaged_copies_differ_in_what_their_kind_says() -> None:
    for seed, sentence in enumerate(SENTENCES):
        copies = {kind: damaged(sentence, kind, seed) for kind in KINDS}
        assert copies == {kind: damaged(sentence, kind, seed) for kind in KINDS}
        assert sorted(copies["shuffled"]) == sorted(copies["swapped"]) == sorted(sentence)
        assert sentence not in copies.values()
        assert sum(a != b for a, b in zip(copies["replaced"], sentence, strict=True)) == 1
        assert len(copies["deleted"]) == len(sentence) - 1
    assert damaged("哈哈", "shuffled", 0) is None
    assert damaged("哈", "deleted", 0) is None


def test_the_interval_is_wilsons() -> None:
    # Newcombe 1998, table I: 81 of 263.
    assert scoring.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    low, high = scoring.wilson(500, 500)
    assert low == pytest.approx(0.9924, abs=1e-4) and high == pytest.approx(1.0)


def test_the_page_shows_the_result_files() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for path in (ROOT / "benchmarks" / "results").glob("scoring_*.json"):
        for table in scoring.report(json.loads(path.read_text(encoding="utf-8"))).split("\n\n"):
            assert table in page, path.name
    for path in (ROOT / "benchmarks" / "results").glob("optimizers_*.json"):
        assert optimizers.report(json.loads(path.read_text(encoding="utf-8"))) in page, path.name
