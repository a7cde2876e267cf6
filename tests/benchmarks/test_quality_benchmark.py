"""The benchmark of quality: every contender learns the same text, and what is measured arrives in file and tables."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import quality
import torch
from machine import ROOT
from training_peers import Sizes

from reformer_lm.text import load_tokenizer

TOY = (
    "--minutes 0.01 --contexts 128 --contenders ours gpt2 llama --tokens_per_step 256 --hidden_size 32 --depth 1 "
    "--heads 2"
).split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "articles.json"
    path.write_text(json.dumps(["春天来了，花开了。" * 100, "秋天" * 50], ensure_ascii=False), encoding="utf-8")
    return path


def test_results_go_into_file_and_tables(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--out", str(tmp_path / "quality.json"), "--keep", str(tmp_path / "models")]
    texts = ["--train", str(corpus), "--validation", str(corpus)]
    quality.main([*TOY, *texts, *files])
    table = capsys.readouterr().out
    results = json.loads((tmp_path / "quality.json").read_text(encoding="utf-8"))
    assert {entry["contender"] for entry in results["runs"]} == {"ours", "gpt2", "llama"}
    for entry in results["runs"]:
        assert entry["tokens_seen"] == entry["steps"] * 256
        assert [part[:2] for part in entry["loss_by_position"]] == [[1, 31], [32, 63], [64, 127]]
        whole = sum((b - a + 1) * loss for a, b, loss in entry["loss_by_position"]) / 127
        assert whole == pytest.approx(entry["loss"])
        # Two articles, each with a token before and after it; one token a character.
        assert entry["tokens_per_character"] == pytest.approx(1 + 4 / 1000)
        assert f"| {entry['loss']:.3f} | {math.exp(entry['loss'] * 1.004):.1f} |" in table
    assert (tmp_path / "models" / "gpt2_128" / "config.json").exists()
    quality.main([*TOY, *texts, *files])
    assert json.loads((tmp_path / "quality.json").read_text(encoding="utf-8")) == results
    with pytest.raises(SystemExit):
        quality.main(files)


@pytest.mark.parametrize("name", list(quality.LABELS))
def test_all_contenders_are_asked_the_same(name: str) -> None:
    if name == "reformer_pytorch":
        pytest.importorskip("reformer_pytorch")
    torch.manual_seed(0)
    model = quality.build(name, Sizes(128, 32, 1, 2, 50))
    tokens = torch.randint(50, (2, 128))
    losses = quality.losses_of(model, tokens)
    assert losses.shape == (2, 127)
    if name != "reformer_pytorch":  # which hashes anew in every pass
        torch.testing.assert_close(quality.training_loss(name, model, tokens), losses.mean())
    by_position = quality.validate(model.eval(), tokens.flatten(), 128, 1)
    if name != "reformer_pytorch":
        torch.testing.assert_close(by_position, losses.double().mean(0), atol=1e-5, rtol=1e-5)


def test_windows_are_a_part_of_the_text_in_another_order(corpus: Path) -> None:
    text = quality.Text(corpus, load_tokenizer())
    first, again, other = (text.batches(64, 2, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape[1:] == (2, 64)
    windows = {tuple(window) for window in text.tokens.unfold(0, 64, 1).tolist()}
    assert {tuple(window) for window in first.flatten(0, 1).tolist()} <= windows


def test_the_page_shows_the_result_files() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for path in (ROOT / "benchmarks" / "results").glob("quality_*.json"):
        assert quality.report(json.loads(path.read_text(encoding="utf-8"))) in page, path.name
