"""The experiment behind the defaults: every row is a model that trains, runs repeat, the page shows the result file."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import choices
import pytest
import torch

from reformer_lm import ReformerLMForCausalLM

ROOT = Path(__file__).parents[2]


@pytest.fixture
def sizes(tmp_path: Path) -> argparse.Namespace:
    letters = [chr(code) for code in range(0x4E00, 0x4E00 + 40)]
    generator = torch.Generator().manual_seed(0)
    texts = []
    for name, count in (("train", 6), ("validation", 2)):
        articles = [
            "".join(letters[i] for i in torch.randint(0, 40, (200,), generator=generator).tolist())
            for _ in range(count)
        ]
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(articles, ensure_ascii=False), encoding="utf-8")
        texts.append(path)
    return argparse.Namespace(
        train=texts[0], validation=texts[1], context=64, steps=3, batch=2, hidden_size=32, layers=4, heads=4,
        device="cpu", bf16=False, threads=torch.get_num_threads(),
    )  # fmt: skip


@pytest.mark.parametrize("row", list(choices.ROWS))
def test_every_row_is_a_model_that_learns_from_its_tokens(row: str, sizes: argparse.Namespace) -> None:
    torch.manual_seed(0)
    model = choices.build_model(row, sizes, 42).train()
    loss = choices.loss_of(model, torch.randint(0, 42, (2, 64)))
    assert abs(loss.item() - math.log(42)) < 0.7
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    if "peer" not in choices.ROWS[row]:
        assert isinstance(model, ReformerLMForCausalLM)
        changed = {**choices.BASE, **choices.ROWS[row]}
        assert all(getattr(model.config, name) == value for name, value in changed.items())


def test_a_run_repeats_and_seeds_differ(sizes: argparse.Namespace) -> None:
    first, again, other = (choices.run("base", seed, 1e-3, sizes) for seed in (0, 0, 1))
    assert first["validation"] == again["validation"] and first["training_curve"] == again["training_curve"]
    assert first["validation"] != other["validation"]
    assert choices.identity(first) == ("base", 0, 1e-3, 64, 3, 2, 32, 4)


def test_windows_are_cut_from_the_text_once_each(sizes: argparse.Namespace) -> None:
    corpus = choices.Corpus(sizes.train, sizes.validation)
    windows = corpus.batches(64, 2, seed=0).flatten(0, 1)
    text = corpus.train.tolist()
    starts = set()
    for window in windows.tolist():
        (found,) = [i for i in range(len(text) - 63) if text[i : i + 64] == window]
        starts.add(found)
    assert len(starts) == len(windows)
    assert len({start % 64 for start in starts}) == 1


def test_the_page_shows_the_result_file() -> None:
    runs = json.loads((ROOT / "benchmarks" / "results" / "choices.json").read_text(encoding="utf-8"))["runs"]
    page = (ROOT / "docs" / "choices.md").read_text(encoding="utf-8")
    for table in choices.tables(runs).split("\n\n"):
        assert table in page


def test_the_readmes_quote_the_result_file() -> None:
    runs = json.loads((ROOT / "benchmarks" / "results" / "choices.json").read_text(encoding="utf-8"))["runs"]
    for page in ("README.md", "README.zh-CN.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for row in ("base", "Llama", "GPT-2"):
            losses = [run["validation"] for run in runs if (run["row"], run["context"]) == (row, 4096)]
            assert f"{sum(losses) / len(losses):.2f}" in text, (page, row)
