"""--task seq2seq: pairs, training, resuming, validating, and predict.py with such a model."""

from __future__ import annotations

import json
import os
import shlex
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

from reformer_lm import ReformerEncDecConfig, ReformerLMForConditionalGeneration
from reformer_lm.errors import InputError
from reformer_lm.prediction import main as predict
from reformer_lm.text import encode_article, load_tokenizer
from reformer_lm.training import main
from reformer_lm.training.checkpoints import load_state
from reformer_lm.training.loop import TrainingLoop
from reformer_lm.training.masking import IGNORED
from reformer_lm.training.pairs import PairBatches, Pairs, read_pairs, validate_pairs
from reformer_lm.training.parallel import Processes
from reformer_lm.training.state import seed_everything

RUN = """--task seq2seq --raw_data_path pairs.jsonl --val_data_path held_out.jsonl --epochs 2 --batch_size 2
    --gradient_accumulation 2 --max_steps 5 --eval_every 2""".split()
CHARACTERS = "春夏秋冬天地山水风花雪月"


def write_pairs(path: str, count: int, seed: int, **names: str) -> None:
    """Some characters, and a sentence with each of them: 花山 -> 花，山。"""
    random = np.random.default_rng(seed)
    lines = []
    for _ in range(count):
        keys = [str(c) for c in random.choice(list(CHARACTERS), int(random.integers(1, 5)))]
        record = {names.get("source", "source"): "".join(keys), names.get("target", "target"): "，".join(keys) + "。"}
        lines.append(json.dumps(record, ensure_ascii=False))
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(autouse=True)
def _in_workplace(workplace: Path) -> None:
    write_pairs("pairs.jsonl", 14, 0)
    write_pairs("held_out.jsonl", 5, 1)


def small_pairs(tokenizer: PreTrainedTokenizerFast) -> Pairs:
    return read_pairs(["held_out.jsonl"], tokenizer, longest=16)


def small_model(tokenizer: PreTrainedTokenizerFast) -> ReformerLMForConditionalGeneration:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "bucket_size": 4, "max_position_embeddings": 16, "initializer_range": 0.3,
    }  # fmt: skip
    return ReformerLMForConditionalGeneration(ReformerEncDecConfig(sizes, sizes)).eval()


def test_pairs_are_read_as_articles(tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = small_pairs(tokenizer)
    records = [json.loads(line) for line in Path("held_out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row.tolist() for row in pairs.sources] == [encode_article(tokenizer, r["source"]) for r in records]
    assert [row.tolist() for row in pairs.targets] == [encode_article(tokenizer, r["target"]) for r in records]
    inputs, count = PairBatches(pairs).make(np.array([3, 0]), 0)
    target = pairs.targets[3]
    length = len(target) - 1
    assert inputs["decoder_input_ids"][0, :length].tolist() == target[:-1].tolist()
    assert inputs["labels"][0, :length].tolist() == target[1:].tolist()
    assert count == len(target) + len(pairs.targets[0]) - 2 == (inputs["labels"] != IGNORED).sum()
    assert inputs["attention_mask"].sum(dim=1).tolist() == [len(pairs.sources[3]), len(pairs.sources[0])]
    filler, none = PairBatches(pairs).make(np.zeros(0, dtype=np.int64), 0)
    assert none == 0 and (filler["labels"] == IGNORED).all()


def test_the_loss_is_that_of_the_targets_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    pairs, model = small_pairs(tokenizer), small_model(tokenizer)
    total, count = 0.0, 0
    for source, target in zip(pairs.sources, pairs.targets, strict=True):
        logits = model(source[None], decoder_input_ids=target[None, :-1]).logits[0]
        total += float(functional.cross_entropy(logits, target[1:], reduction="sum").detach())
        count += len(target) - 1
    for batch_size in (1, 2, 9):
        result = validate_pairs(
            model, pairs, batch_size, torch.device("cpu"), lambda: False, Processes(Accelerator(cpu=True))
        )
        assert result is not None and result.tokens == count
        assert result.loss == pytest.approx(total / count, rel=1e-5)
    stopped = validate_pairs(model, pairs, 2, torch.device("cpu"), lambda: True, Processes(Accelerator(cpu=True)))
    assert stopped is None


@pytest.mark.parametrize("step", [1, 3])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(
    step: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = json.loads(Path("configs/tiny.json").read_text())
    settings["model"]["rehash"] = "step"
    Path("configs/tiny.json").write_text(json.dumps(settings))
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
    seed_everything(123)
    command = shlex.split(last_line.split("continue with: ")[1])
    assert main(command[command.index("--task") :]) == 0
    ours, theirs = load_file("straight/model.safetensors"), load_file("broken off/model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert load_state(Path("straight"))["progress"] == load_state(Path("broken off"))["progress"]


def test_a_trained_model_writes_targets(capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs("named.jsonl", 30, 3, source="keywords", target="sentence")
    run = ["--task", "seq2seq", "--raw_data_path", "named.jsonl", "--val_data_path", "named.jsonl"]
    names = ["--source_field", "keywords", "--target_field", "sentence", "--batch_size", "10"]
    assert main([*run, *names, "--epochs", "100", "--max_steps", "40", "--eval_every", "0"]) == 0
    progress = load_state(Path("model"))["progress"]
    assert progress["last_loss"] < 0.7 * progress["first_loss"]
    record = json.loads(Path("model/run.json").read_text(encoding="utf-8"))["starts"][0]
    assert record["data"]["named.jsonl"] == "30 pairs"
    model = AutoModelForSeq2SeqLM.from_pretrained("model").eval()
    tokenizer = load_tokenizer("model")
    capsys.readouterr()
    options = ["--device", "cpu", "--top_k", "1", "--repetition_penalty", "1", "--length", "9", "--seed", "1"]
    assert predict(["--text", "花山", *options]) == 0
    written = capsys.readouterr().out.strip()
    source = torch.tensor([encode_article(tokenizer, "花山")])
    greedy = model.generate(
        source, max_new_tokens=9, do_sample=False, begin_suppress_tokens=[tokenizer.eos_token_id],
        suppress_tokens=[tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id],
    )  # fmt: skip
    assert written == tokenizer.decode(greedy[0], skip_special_tokens=True)
    assert predict(["--text", "花山", "--json", "--nsamples", "2", "--device", "cpu", "--length", "9"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["source"] for line in lines] == ["花山", "花山"]
    # The printed settings give the same run again.
    assert main([*run, *names, "--model_config", "model/run_config.json", "--max_steps", "1"]) == 0
    for arguments, fragment in (
        (["--ppl", "--text", "春"], "--ppl needs a language model"),
        (["--unconditional"], "--unconditional needs a language model"),
        (["--text", "春" * 20], "the source has 22 tokens, more than the model's 16"),
    ):
        capsys.readouterr()
        assert predict([*arguments, "--device", "cpu"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and fragment in line


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ('{"source": "春", "target": "花。"}\n{"source": "春"}\n', "line 2: 'target' is missing or no string"),
        ('{"source": " ", "target": "花。"}\n', "line 1: 'source' is empty"),
        ('["春", "花。"]\n', "line 1: 'source' is missing or no string"),
        ('{"source": "春", \n', "invalid JSON at line 1 column"),
        ("\n\n", "no pair in it"),
        (json.dumps({"source": "春" * 15, "target": "花"}), "line 1: the source has 17 tokens, more than 16"),
        (json.dumps({"source": "春", "target": "花" * 15}), "line 1: the target has 17 tokens, more than 16"),
    ],
)
def test_pairs_that_cannot_be_used(content: str, fragment: str, tokenizer: PreTrainedTokenizerFast) -> None:
    Path("bad.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(InputError) as raised:
        read_pairs(["bad.jsonl"], tokenizer, longest=16)
    assert fragment in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--raw_data_path", "data/train.json"], "pairs come in .jsonl files"),
        (["--raw_data_path", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--stride", "8"], "--stride does not go with --task seq2seq"),
        (["--pad_articles"], "--pad_articles does not go with --task seq2seq"),
        (["--estimate"], "--estimate does not go with --task seq2seq"),
        (["--init_from", "language model"], "is missing there"),
        (["--task", "mlm", "--init_from", "pairs model"], "reformer_enc_dec"),
        (["--output_dir", "pairs model", "--resume", "--raw_data_path", "held_out.jsonl"], "was another one"),
        (["--source_field", "keywords"], "'keywords' is missing or no string"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(
    arguments: list[str], fragment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "language model" in arguments:
        assert main(["--raw", "--output_dir", "language model", "--max_steps", "1"]) == 0
    if "pairs model" in arguments:
        assert main([*RUN, "--output_dir", "pairs model", "--max_steps", "1"]) == 0
    capsys.readouterr()
    assert main([*RUN, *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and fragment in error
