"""The same numbers from other people's tools, for a model folder as it is saved."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BatchEncoding, PreTrainedModel, PreTrainedTokenizerFast

from reformer_lm import ReformerLMConfig, ReformerLMForCausalLM
from reformer_lm.scoring import Score, score
from reformer_lm.text import load_tokenizer

ROOT = Path(__file__).parents[2]
TASKS = ROOT / "examples" / "lm_eval_tasks"
SENTENCES = [json.loads(line)["text"] for line in (TASKS / "sentences.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = load_tokenizer()
    torch.manual_seed(0)
    config = ReformerLMConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_hashes=2,
        max_position_embeddings=64, bucket_size=8, initializer_range=0.3, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("saved") / "model"
    ReformerLMForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    return AutoModelForCausalLM.from_pretrained(folder).eval(), load_tokenizer(folder)


@pytest.fixture(scope="module")
def ours(loaded: tuple[PreTrainedModel, PreTrainedTokenizerFast]) -> list[Score]:
    return score(*loaded, SENTENCES)


def test_transformers_own_loss(loaded: tuple[PreTrainedModel, PreTrainedTokenizerFast], ours: list[Score]) -> None:
    model, tokenizer = loaded
    for sentence, result in zip(SENTENCES, ours, strict=True):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(sentence)]])
        with torch.no_grad():
            loss = model(ids, labels=ids).loss.item()
        assert result.nll / result.tokens == pytest.approx(loss, abs=1e-4)


@pytest.mark.slow
def test_lm_evaluation_harness(folder: Path, ours: list[Score], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    command = [
        sys.executable, "examples/lm_eval_harness.py", "--model", "hf", "--model_args",
        f"pretrained={folder},dtype=float32", "--tasks", "fluency", "--include_path", "examples/lm_eval_tasks",
        "--device", "cpu", "--batch_size", "4", "--log_samples", "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    # As the README has it, from the root of the repository, where the package lies.
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-2000:]
    (samples,) = (tmp_path / "out").rglob("samples_fluency_*.jsonl")
    found = {}
    for line in samples.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        found[sample["doc"]["text"]] = float(sample["filtered_resps"][0])
    assert len(found) == len(SENTENCES)
    for result in ours:
        assert -found[result.text] / result.tokens == pytest.approx(result.nll / result.tokens, abs=1e-4)
    (summary,) = (tmp_path / "out").rglob("results_*.json")
    stated = json.loads(summary.read_text(encoding="utf-8"))["results"]["fluency"]["bits_per_byte,none"]
    size = sum(len(sentence.encode()) for sentence in SENTENCES)
    assert stated == pytest.approx(math.fsum(result.nll for result in ours) / size / math.log(2), abs=1e-4)


@pytest.mark.slow
def test_minicons(loaded: tuple[PreTrainedModel, PreTrainedTokenizerFast], ours: list[Score]) -> None:
    scorer = pytest.importorskip("minicons.scorer")
    model, tokenizer = loaded
    theirs = scorer.IncrementalLMScorer(model, "cpu", tokenizer=tokenizer)
    for sentence, result in zip(SENTENCES, ours, strict=True):
        # Given text, it would split the start of an article into letters, and leave out the first token.
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(sentence)]])
        encoded = BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        (found,) = theirs.compute_stats((encoded, [0]))
        assert [-value for value in found] == pytest.approx(result.surprisals, abs=1e-4)
