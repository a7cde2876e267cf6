"""Models of transformers' through the same two scripts: GPT-2 above all, which GPT2-Chinese's users bring along."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from reformer_lm.corpus import EvaluationWindows, TokenStream
from reformer_lm.errors import InputError
from reformer_lm.prediction import main as predict
from reformer_lm.training import main
from reformer_lm.training.batches import TrainingPlan
from reformer_lm.training.checkpoints import load_state
from reformer_lm.training.evaluation import validate
from reformer_lm.training.loop import LoopSettings, TrainingLoop
from reformer_lm.training.model_configs import build_config
from reformer_lm.training.optimization import LearningRateSchedule, build_optimizer, split_by_decay

GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
SIZES = {key: value for key, value in GPT2.items() if key != "model_type"}
LLAMA = {
    "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 16,
}  # fmt: skip
RUN = """--raw --epochs 2 --batch_size 2 --gradient_accumulation 2 --max_seq_len 16 --stride 27 --max_steps 6
    --eval_every 3 --model_config other.json""".split()


def write_config(model: dict[str, object]) -> None:
    training = json.loads(Path("configs/tiny.json").read_text())["training"]
    Path("other.json").write_text(json.dumps({"model": model, "training": training}))


@pytest.mark.parametrize("settings", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_it_trains_resumes_generates_and_scores(
    settings: dict[str, object], workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(settings)
    assert main([*RUN, "--output_dir", "straight"]) == 0
    assert main([*RUN, "--output_dir", "model", "--save_every", "2", "--save_total_limit", "9"]) == 0
    # Goes on exactly, dropout and all.
    assert main([*RUN, "--output_dir", "model", "--restore", "model/checkpoints/step-00000004"]) == 0
    ours, theirs = load_file("straight/model.safetensors"), load_file("model/model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    state = load_state(Path("model"))["progress"]
    assert state["last_loss"] < state["first_loss"]
    assert type(AutoModelForCausalLM.from_pretrained("model")).__name__.lower().startswith(str(settings["model_type"]))

    capsys.readouterr()
    assert predict(["--text", "春夏秋冬", "--length", "5", "--seed", "1", "--device", "cpu", "--quiet"]) == 0
    assert len(capsys.readouterr().out.strip()) > 4
    assert predict(["--ppl", "--text", "春夏秋冬", "--device", "cpu"]) == 0
    assert float(capsys.readouterr().out.split("\t")[0]) > 1


def test_loss_and_gradient_are_those_of_the_model_itself(
    tokenizer: PreTrainedTokenizerFast, make_loop: Callable[..., TrainingLoop]
) -> None:
    config = GPT2Config(vocab_size=len(tokenizer), resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **SIZES)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    reference = GPT2LMHeadModel(config)
    reference.load_state_dict(model.state_dict())
    loop = make_loop(
        model,
        plan=TrainingPlan(10, 2, 2, 1, 0, max_steps=1),
        settings=LoopSettings(batch_size=2),
        schedule=LearningRateSchedule(0.01, 1, 0),
        validation=None,
    )
    (first,) = list(loop.plan.steps())[:1]
    loop.run()
    batch = loop.windows.batch(np.concatenate(first.batches))
    reference.train()
    reference(input_ids=batch, labels=batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    build_optimizer(reference, 0.01, 0.1).step()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, reference.get_parameter(name), rtol=1e-4, atol=1e-5)


def test_validation_counts_each_token_once(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **SIZES)).eval()
    tokens = np.random.default_rng(0).integers(5, len(tokenizer), 40).astype(np.uint16)
    result = validate(model, EvaluationWindows(TokenStream([tokens]), 16), 2, torch.device("cpu"))
    assert result is not None
    total = 0.0
    ids = torch.from_numpy(tokens.astype(np.int64))
    for start in range(0, 39, 15):
        window = ids[start : start + 16].unsqueeze(0)
        logits = model(window).logits
        total += float(functional.cross_entropy(logits[0, :-1], window[0, 1:], reduction="sum").detach())
    assert result.loss == pytest.approx(total / 39, rel=1e-5)


def test_matrices_of_gpt2_decay() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, **SIZES))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, _ = split_by_decay(model)
    assert sorted({names[id(p)].split(".", 3)[3] for p in decayed}) == [
        "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight",
    ]  # fmt: skip


def test_weights_from_elsewhere_are_fine_tuned_whole_or_not_at_all(
    workplace: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(GPT2)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **SIZES))
    model.save_pretrained("published")
    tokenizer.save_pretrained("published")
    run = [*RUN[:-2], "--pretrained_model", "published", "--lr", "1e-12"]
    assert main(run) == 0
    after = load_file("model/model.safetensors")
    torch.testing.assert_close(after["transformer.wte.weight"], model.transformer.wte.weight.detach())

    weights = model.state_dict()
    del weights["transformer.h.1.mlp.c_fc.weight"]
    model.save_pretrained("published", state_dict=weights)
    capsys.readouterr()
    assert main(run) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: published: ") and "c_fc.weight is missing" in error
    assert main([*RUN[:-2], "--pretrained_model", "published", "--model_config", "configs/tiny.json"]) == 2
    assert "this is a gpt2 model, but configs/tiny.json describes a reformer_lm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "fragment"),
    [
        ({"model_type": "gpt3"}, "did you mean"),
        ({"model_type": "bert-of-mine"}, "no causal language model of model_type 'bert-of-mine'"),
        ({**GPT2, "n_layers": 3}, "unknown model key 'n_layers'; did you mean 'n_layer'"),
        ({"n_embd": 16}, 'here it is called \'hidden_size\' (for a GPT-2, add "model_type": "gpt2")'),
        ({**GPT2, "epochs": 3}, "training option"),
        ({**GPT2, "vocab_size": 3}, "vocab_size is 3"),
    ],
)
def test_what_cannot_be_built_is_said(
    settings: dict[str, object], fragment: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(InputError) as raised:
        build_config(settings, "c.json", tokenizer)
    assert fragment in str(raised.value) and "\n" not in str(raised.value)


def test_gpt2_chinese_configurations_are_taken_as_they_are(tokenizer: PreTrainedTokenizerFast) -> None:
    settings = {
        "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new", "n_ctx": 16, "n_embd": 16,
        "n_head": 2, "n_layer": 2, "n_positions": 16, "layer_norm_epsilon": 1e-5, "initializer_range": 0.02,
        "output_past": True, "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 320}},
    }  # fmt: skip
    config = build_config(settings, "config.json", tokenizer)
    assert (config.model_type, config.n_embd, config.max_position_embeddings) == ("gpt2", 16, 16)


def test_articles_of_one_window_are_kept_apart_by_ours_alone(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(GPT2)
    assert main([*RUN, "--separate_articles"]) == 2
    assert "a gpt2 cannot keep articles in one window apart; give --pad_articles" in capsys.readouterr().err


def test_the_estimate_of_another_model(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(GPT2)
    assert main([*RUN, "--estimate"]) == 0
    assert "activations" in capsys.readouterr().out
