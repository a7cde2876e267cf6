import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from reformer_lm import ReformerLMConfig, ReformerLMForCausalLM
from reformer_lm.corpus import EvaluationWindows, TokenStream, TokenWindows
from reformer_lm.errors import InputError
from reformer_lm.training.batches import TrainingPlan, article_numbers
from reformer_lm.training.evaluation import validate, write_sample
from reformer_lm.training.loop import LoopSettings, TrainingLoop
from reformer_lm.training.optimization import LearningRateSchedule, build_optimizer
from reformer_lm.training.reporting import Reporter, StepReport
from reformer_lm.training.state import seed_everything

MakeLoop = Callable[..., TrainingLoop]
CPU = torch.device("cpu")


class Recorder(Reporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.steps: list[StepReport] = []
        self.warnings: list[str] = []
        self.samples: list[tuple[int, str]] = []
        self.validations: list[int] = []

    def step(self, report: StepReport) -> None:
        self.steps.append(report)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def sample(self, step: int, text: str) -> None:
        self.samples.append((step, text))

    def validation(self, step: int, validation: Any) -> None:
        self.validations.append(step)


def model_of(config: ReformerLMConfig, **changes: Any) -> ReformerLMForCausalLM:
    seed_everything(1)
    return ReformerLMForCausalLM(ReformerLMConfig(**{**config.to_dict(), **changes}))


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("rehash", ["fixed", "step"])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(3, 2), (2, 3), (1, 6), (4, 2)])
def test_accumulated_batches_train_like_the_larger_batch(
    tiny_config: ReformerLMConfig, make_loop: MakeLoop, batch_size: int, accumulation: int, rehash: str
) -> None:
    # 10 windows: the last step of an epoch has fewer, in batches of uneven size.
    results = []
    for size, batches in ((batch_size, accumulation), (batch_size * accumulation, 1)):
        model = model_of(tiny_config, rehash=rehash).double()
        recorder = Recorder()
        plan = TrainingPlan(10, size, batches, epochs=2, seed=0)
        make_loop(model, plan=plan, reporter=recorder, validation=None).run()
        results.append((weights_of(model), recorder.steps))
    (ours, our_steps), (theirs, their_steps) = results
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-7, atol=1e-9)
    assert len(our_steps) == len(their_steps) == 4
    for one, other in zip(our_steps, their_steps, strict=True):
        # Reported in single precision.
        assert one.loss == pytest.approx(other.loss, rel=1e-6)
        assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-6)
        assert one.tokens == other.tokens
        assert one.learning_rate == other.learning_rate


def test_one_step_is_adamw_on_the_clipped_mean_gradient(tiny_config: ReformerLMConfig, make_loop: MakeLoop) -> None:
    model, reference = model_of(tiny_config), model_of(tiny_config)
    loop = make_loop(
        model,
        plan=TrainingPlan(10, 4, 2, 1, 0, max_steps=1),
        settings=LoopSettings(batch_size=2, max_grad_norm=0.01),
        schedule=LearningRateSchedule(0.01, 1, 0),
        validation=None,
    )
    (first,) = list(loop.plan.steps())[:1]
    loop.run()

    reference.train()
    batch = loop.windows.batch(np.concatenate(first.batches))
    logits = reference(batch, labels=batch, skip_logits=False).logits
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.01)
    assert norm > 0.1
    build_optimizer(reference, 0.01, 0.1).step()
    for name, weight in weights_of(model).items():
        torch.testing.assert_close(weight, reference.get_parameter(name).detach(), rtol=1e-4, atol=1e-5)


def test_same_seed_same_weights(tiny_config: ReformerLMConfig, make_loop: MakeLoop) -> None:
    results = []
    for sample_every in (0, 1):
        model = model_of(tiny_config, hidden_dropout_prob=0.2, rehash="step")
        recorder = Recorder()
        settings = LoopSettings(batch_size=2, sample_every=sample_every, eval_every=sample_every)
        make_loop(model, settings=settings, reporter=recorder).run()
        results.append(weights_of(model))
        assert [step for step, _ in recorder.samples] == ([1, 2, 3, 4] if sample_every else [])
        assert recorder.validations == ([0, 1, 2, 3, 4] if sample_every else [0, 4])
    # Neither validations nor samples move the run's random numbers.
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_samples_repeat_and_follow_their_seed(
    tiny_config: ReformerLMConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = model_of(tiny_config).train()
    model.generation_config.do_sample = True
    before = torch.get_rng_state()
    texts = [write_sample(model, tokenizer, seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


@pytest.mark.parametrize("count", [2, 16, 17, 31, 32, 50, 61])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_validation_is_the_mean_over_each_token_once(
    tiny_config: ReformerLMConfig, count: int, batch_size: int
) -> None:
    model = model_of(tiny_config, hidden_dropout_prob=0.5).train()
    tokens = torch.from_numpy(np.random.default_rng(count).integers(5, tiny_config.vocab_size, count))
    windows = EvaluationWindows(TokenStream([tokens.numpy()]), 16)
    result = validate(model, windows, batch_size, CPU)
    assert result is not None
    assert model.training

    model.eval()
    losses = []
    with torch.no_grad():
        for start in range(0, count - 1, 15):
            window = tokens[start : start + 16].unsqueeze(0)
            losses.append(functional.cross_entropy(model(window).logits[0, :-1], window[0, 1:], reduction="none"))
    expected = torch.cat(losses).double()
    assert len(expected) == count - 1 == result.tokens
    assert result.loss == pytest.approx(float(expected.mean()), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert validate(model, windows, batch_size, CPU, should_stop=lambda: True) is None


def poison(model: ReformerLMForCausalLM, steps: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the loss of some forward passes in training infinite."""
    forward, calls = model.forward, iter(range(1000))

    def poisoned(*arguments: Any, **keywords: Any) -> Any:
        output = forward(*arguments, **keywords)
        if model.training and next(calls) in steps:
            output.loss = output.loss * math.inf
        return output

    monkeypatch.setattr(model, "forward", poisoned)


def test_step_with_a_loss_that_is_not_finite_is_left_out(
    tiny_config: ReformerLMConfig, make_loop: MakeLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(tiny_config)
    poison(model, {1}, monkeypatch)
    recorder = Recorder()
    snapshots = []
    loop = make_loop(model, reporter=recorder, validation=None)
    after_step = loop._after_step
    monkeypatch.setattr(loop, "_after_step", lambda: (snapshots.append(weights_of(model)), after_step()))
    progress = loop.run()
    assert progress.step == 4
    assert progress.skipped_steps == 1
    assert [report.step for report in recorder.steps] == [1, 3, 4]
    assert recorder.warnings == ["step 2 left out: loss or gradient is not finite (1 left out so far)"]
    assert all(torch.equal(snapshots[0][name], snapshots[1][name]) for name in snapshots[0])
    assert not all(torch.equal(snapshots[1][name], snapshots[2][name]) for name in snapshots[0])
    assert all(torch.isfinite(weight).all() for weight in weights_of(model).values())


@pytest.mark.parametrize("save_every", [0, 2])
def test_ten_in_a_row_end_the_run(
    tiny_config: ReformerLMConfig, make_loop: MakeLoop, monkeypatch: pytest.MonkeyPatch, save_every: int
) -> None:
    model = model_of(tiny_config)
    # Not ten in a row, then ten.
    poison(model, {*range(9), *range(10, 30)}, monkeypatch)
    loop = make_loop(
        model,
        plan=TrainingPlan(10, 1, 1, 5, 0),
        settings=LoopSettings(batch_size=1, save_every=save_every),
        reporter=Recorder(),
        validation=None,
    )
    with pytest.raises(InputError, match="stopped at step 20: .* 10 times in a row.*--lr") as error:
        loop.run()
    assert ("step-00000018" in str(error.value)) == bool(save_every)
    assert loop.progress.skipped_steps == 19


def test_final_folder_is_the_trained_model(tiny_config: ReformerLMConfig, make_loop: MakeLoop, tmp_path: Path) -> None:
    model = model_of(tiny_config)
    make_loop(model, settings=LoopSettings(batch_size=2, save_every=1)).run()
    assert sorted(path.name for path in (tmp_path / "model" / "checkpoints").iterdir()) == [
        "step-00000003",
        "step-00000004",
    ]
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert saved.keys() == weights_of(model).keys()
    assert all(torch.equal(saved[name], weight) for name, weight in weights_of(model).items())


@pytest.mark.parametrize("separate", [False, True])
def test_separate_articles_reach_the_model_in_training_and_validation(
    separate: bool, tiny_config: ReformerLMConfig, make_loop: MakeLoop, tokenizer: PreTrainedTokenizerFast
) -> None:
    begin = tokenizer.bos_token_id
    tokens = np.random.default_rng(0).integers(begin, begin + 4, 160).astype(np.uint16)
    model = model_of(tiny_config)
    seen: dict[bool, int] = {True: 0, False: 0}

    def watch(module: torch.nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        seen[module.training] += 1
        documents = options.get("document_ids")
        if separate:
            assert torch.equal(documents, (options["input_ids"] == begin).cumsum(1))
        else:
            assert documents is None

    model.register_forward_pre_hook(watch, with_kwargs=True)
    loop = make_loop(
        model,
        windows=TokenWindows(TokenStream([tokens]), 16, 16),
        validation=EvaluationWindows(TokenStream([tokens[:50]]), 16),
        settings=LoopSettings(batch_size=2, separate_articles=separate),
    )
    loop.run()
    assert min(seen.values()) > 0


def test_articles_are_numbered_by_the_token_they_begin_with() -> None:
    tokens = torch.tensor([[7, 7, 4, 8, 4, 4, 9]])
    assert article_numbers(tokens, 4).tolist() == [[0, 0, 1, 1, 2, 3, 3]]
