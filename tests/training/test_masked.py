"""--task mlm: masks, training, resuming, validating, and predict.py with such a model."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerFast

from reformer_lm import ReformerLMConfig, ReformerLMForMaskedLM
from reformer_lm.corpus import EvaluationWindows, TokenStream, TokenWindows
from reformer_lm.generation.filling import fill_masks
from reformer_lm.prediction import main as predict
from reformer_lm.text import encode_article, encode_with_masks, load_tokenizer, mask_token_of
from reformer_lm.training import main
from reformer_lm.training.batches import BatchMaker
from reformer_lm.training.checkpoints import load_state
from reformer_lm.training.evaluation import validate
from reformer_lm.training.loop import TrainingLoop
from reformer_lm.training.masking import IGNORED, Masking
from reformer_lm.training.state import seed_everything

RUN = """--task mlm --raw --epochs 2 --batch_size 2 --gradient_accumulation 2 --max_seq_len 16 --stride 27 --max_steps 6
    --eval_every 2""".split()


def test_masks_are_berts_and_follow_from_their_key() -> None:
    masking = Masking(0.15, mask_token=4, special_tokens=(0, 1, 2, 4), vocab_size=50)
    row = torch.from_numpy(np.random.default_rng(0).integers(0, 50, 200_000))
    inputs, labels = masking.hide(row, [3, 1])
    chosen = labels != IGNORED
    assert torch.equal(labels[chosen], row[chosen])
    assert torch.equal(inputs[~chosen], row[~chosen])
    special = torch.isin(row, torch.tensor(masking.special_tokens))
    assert not (chosen & special).any()
    assert chosen.sum() / (~special).sum() == pytest.approx(0.15, abs=0.005)
    hidden, kept = inputs[chosen] == 4, inputs[chosen] == row[chosen]
    assert hidden.double().mean() == pytest.approx(0.8, abs=0.01)
    # A random token may be the right one.
    assert kept.double().mean() == pytest.approx(0.1 + 0.1 / 46, abs=0.01)
    others = inputs[chosen][~hidden & ~kept]
    assert not torch.isin(others, torch.tensor(masking.special_tokens)).any() and len(others.unique()) == 46
    again, other = masking.hide(row, [3, 1]), masking.hide(row, [3, 2])
    assert torch.equal(again[0], inputs) and torch.equal(again[1], labels)
    assert not torch.equal(other[1], labels)


def test_of_each_row_something_is_hidden_if_it_may_be() -> None:
    masking = Masking(1e-9, mask_token=4, special_tokens=(0, 4), vocab_size=9)
    for key in range(20):
        inputs, labels = masking.hide(torch.tensor([4, 7, 5, 0]), [key])
        assert (labels != IGNORED).sum() == 1 and (inputs != torch.tensor([4, 7, 5, 0])).sum() <= 1
    inputs, labels = masking.hide(torch.tensor([4, 0]), [1])
    assert torch.equal(inputs, torch.tensor([4, 0])) and (labels == IGNORED).all()


def test_batches_do_not_depend_on_what_else_is_in_them() -> None:
    tokens = np.random.default_rng(0).integers(5, 40, 160).astype(np.uint16)
    windows = TokenWindows(TokenStream([tokens]), 16, 16)
    batches = BatchMaker(windows, seed=7, masking=Masking(0.15, 4, (0, 1, 2, 3, 4), 40))
    whole, count = batches.make(np.arange(10), 1)
    assert count == (whole["labels"] != IGNORED).sum()
    one, _ = batches.make(np.array([6]), 1)
    assert all(torch.equal(one[name][0], whole[name][6]) for name in ("input_ids", "labels"))
    later, _ = batches.make(np.array([6]), 2)
    assert not torch.equal(later["labels"], one["labels"])
    filler, count = batches.make(np.zeros(0, dtype=np.int64), 1)
    assert count == 0 and (filler["labels"] == IGNORED).all()


@pytest.mark.parametrize("step", [1, 3])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(
    step: int, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*RUN, "--output_dir", "straight"]) == 0
    train_step = TrainingLoop._train_step

    def interrupted(loop: TrainingLoop, windows: object) -> object:
        if loop.progress.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(loop, windows)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "_train_step", interrupted)
        assert main([*RUN, "--output_dir", "broken off"]) == 0
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert last_line.startswith(f"stopped and saved at step {step}; continue with: ")
    seed_everything(123)
    command = shlex.split(last_line.split("continue with: ")[1])
    assert main(command[command.index("--task") :]) == 0
    ours, theirs = load_file("straight/model.safetensors"), load_file("broken off/model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    progress = load_state(Path("straight"))["progress"]
    assert progress == load_state(Path("broken off"))["progress"]
    # Once more from a checkpoint in the middle.
    assert main([*RUN, "--output_dir", "model", "--restore", "straight/checkpoints/step-00000004"]) == 0
    again = load_file("model/model.safetensors")
    assert all(torch.equal(ours[name], again[name]) for name in ours)


def test_a_trained_model_fills_in(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--task", "mlm", "--raw", "--batch_size", "8", "--epochs", "100", "--max_steps", "90", "--stride", "3"]
    assert main([*run, "--max_seq_len", "16", "--eval_every", "0", "--sample_every", "20"]) == 0
    out = capsys.readouterr().out
    assert "--text 春[MASK]" in out.replace("'", "")
    progress = load_state(Path("model"))["progress"]
    assert progress["last_loss"] < 0.9 * progress["first_loss"]
    model = AutoModelForMaskedLM.from_pretrained("model")
    assert isinstance(model, ReformerLMForMaskedLM) and not model.config.causal
    capsys.readouterr()
    assert predict(["--text", "春天[MASK]雪大", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = fill_masks(model.eval(), load_tokenizer("model"), "春天[MASK]雪大")
    assert lines[0] == expected.text and len(lines[0]) == 5
    assert lines[1].startswith(f"  1: {expected.places[0][0].token} {expected.places[0][0].probability:.3f}  ")
    assert predict(["--text", "[MASK]天[MASK]", "--device", "cpu", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["given"] == "[MASK]天[MASK]" and len(record["text"]) == 3 and record["text"][1] == "天"
    assert [len(candidates) for candidates in record["masks"]] == [5, 5]
    assert predict(["--text", "春[MASK]", "--device", "cpu", "--quiet"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    for arguments, fragment in (
        (["--text", "春天"], "the text has no [MASK]"),
        (["--text", "春[MASK]" * 10], "the text has 22 tokens, more than the model's 16"),
        (["--ppl", "--text", "春"], "--ppl needs a model that predicts the next token"),
        (["--unconditional"], "--unconditional needs a model"),
    ):
        assert predict([*arguments, "--device", "cpu"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and fragment in line


def test_candidates_are_the_models_probabilities(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    config = ReformerLMConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, bucket_size=4,
        max_position_embeddings=32, causal=False, lsh_mask="chunked", initializer_range=0.5,
    )  # fmt: skip
    model = ReformerLMForMaskedLM(config).eval()
    ids = encode_with_masks(tokenizer, "春[MASK]天[MASK]")
    mask = mask_token_of(tokenizer)
    plain = encode_article(tokenizer, "春天")
    assert ids == [plain[0], plain[1], mask, plain[2], mask, plain[3]]
    # Without masks in it, a text is read as ever; the letters of [MASK] elsewhere are letters.
    assert encode_with_masks(tokenizer, "春天") == plain
    probabilities = model(torch.tensor([ids])).logits[0, [2, 4]].softmax(dim=-1)
    filled = fill_masks(model, tokenizer, "春[MASK]天[MASK]", candidates=3)
    ordinary = probabilities.clone()
    ordinary[:, tokenizer.all_special_ids] = 0.0
    for row, candidates in zip(ordinary, filled.places, strict=True):
        values, indices = row.topk(3)
        assert [c.token for c in candidates] == tokenizer.convert_ids_to_tokens(indices.tolist())
        assert [c.probability for c in candidates] == pytest.approx(values.tolist())
    assert filled.text == f"春{filled.places[0][0].text}天{filled.places[1][0].text}"


def test_validation_scores_what_a_fixed_mask_hides(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "bucket_size": 4}
    config = ReformerLMConfig(
        vocab_size=len(tokenizer), max_position_embeddings=16, causal=False, lsh_mask="chunked", **sizes
    )
    model = ReformerLMForMaskedLM(config).eval()
    tokens = np.random.default_rng(0).integers(5, len(tokenizer), 100).astype(np.uint16)
    windows = EvaluationWindows(TokenStream([tokens]), 16)
    masking = Masking(0.3, mask_token_of(tokenizer), tuple(tokenizer.all_special_ids), len(tokenizer))
    results = [validate(model, windows, size, torch.device("cpu"), masking=masking) for size in (1, 3)]
    assert results[0] is not None and results[1] is not None
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-6) and results[0].tokens == results[1].tokens
    total, count = 0.0, 0
    for index in range(len(windows)):
        inputs, labels = masking.hide(windows[index], [20181011, index])
        if index:
            labels[0] = IGNORED
        logits = model(inputs.unsqueeze(0)).logits[0]
        total += float(functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED).detach())
        count += int((labels != IGNORED).sum())
    assert results[0].tokens == count and 20 < count < 40
    assert results[0].loss == pytest.approx(total / count, rel=1e-5)
    assert not model.training


def test_articles_apart_padded_and_averaged(workplace: Path) -> None:
    for options in (["--separate_articles"], ["--pad_articles"], ["--ema", "0.5", "--noise", "0.1"]):
        assert main([*RUN, *options]) == 0
        assert np.isfinite(load_state(Path("model"))["progress"]["last_loss"])
        shutil.rmtree("model")


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--task", "bert"], "it must be one of clm, mlm"),
        (["--mlm_probability", "0"], "it must be greater than 0"),
        (["--mlm_probability", "1.5"], "it must be from 0 to 1"),
        (["--model_config", "causal.json"], "causal=False is not possible"),
        (["--model_config", "gpt2.json"], "--task mlm trains models of this package, not a gpt2"),
        (["--init_from", "language model"], "this is a causal model, and --task mlm needs one that sees both sides"),
        (["--task", "clm", "--init_from", "masked"], "this is a bidirectional model"),
        (["--task", "clm", "--output_dir", "masked", "--resume"], "this is a bidirectional model"),
        (["--output_dir", "masked", "--resume", "--seed", "9"], "--seed was 42, now 9"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(
    arguments: list[str], fragment: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = json.loads(Path("configs/tiny.json").read_text())
    wrong = {**settings, "model": {**settings["model"], "lsh_mask": "causal"}}
    Path("causal.json").write_text(json.dumps(wrong))
    sizes = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    Path("gpt2.json").write_text(json.dumps({**settings, "model": sizes}))
    if "language model" in arguments:
        assert main([*RUN, "--task", "clm", "--output_dir", "language model", "--max_steps", "1"]) == 0
    if "masked" in arguments:
        assert main([*RUN, "--output_dir", "masked", "--max_steps", "1"]) == 0
    capsys.readouterr()
    assert main([*RUN, *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and fragment in error


def test_weights_of_a_language_model_are_read_with_a_configuration(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*RUN, "--task", "clm", "--output_dir", "language model", "--max_steps", "1"]) == 0
    run = [*RUN, "--init_from", "language model", "--model_config", "configs/tiny.json", "--lr", "1e-12"]
    assert main([*run, "--max_steps", "1"]) == 0
    before, after = load_file("language model/model.safetensors"), load_file("model/model.safetensors")
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6)
    capsys.readouterr()
    assert main([*RUN, "--estimate"]) == 0
    assert "activations" in capsys.readouterr().out
