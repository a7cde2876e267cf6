"""What flags beyond the plain loop do: early stopping, averages, frozen parameters, other optimizers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from reformer_lm import ReformerLMConfig, ReformerLMForCausalLM
from reformer_lm.training import loop as loop_module
from reformer_lm.training import main
from reformer_lm.training.batches import TrainingPlan
from reformer_lm.training.checkpoints import load_state
from reformer_lm.training.evaluation import Validation
from reformer_lm.training.loop import LoopSettings, TrainingLoop

MakeLoop = Callable[..., TrainingLoop]
RUN = """--raw --epochs 2 --batch_size 2 --gradient_accumulation 2 --max_seq_len 16 --stride 27 --max_steps 4""".split()


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("patience", "last"), [(0, 8), (1, 2), (2, 5), (3, 6)])
def test_early_stopping(
    patience: int,
    last: int,
    tiny_config: ReformerLMConfig,
    make_loop: MakeLoop,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = iter([9.0, 5.0, 6.0, 4.0, 4.5, 4.0, 7.0, 3.0, 2.0])
    monkeypatch.setattr(loop_module, "validate", lambda *given, **options: Validation(next(losses), 10))
    plan = TrainingPlan(8, 1, 1, 1, 0)
    settings = LoopSettings(batch_size=1, eval_every=1, early_stopping=patience)
    loop = make_loop(ReformerLMForCausalLM(tiny_config), plan=plan, settings=settings)
    progress = loop.run()
    assert progress.step == last
    assert loop.stopped_early == (patience > 0)
    # A checkpoint for each new lowest loss, and one for the end.
    saved = [int(path.name[5:]) for path in loop.store.complete()]
    assert saved[-1] == last and progress.best_step in saved


def test_an_early_stop_is_said_and_stays(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = [*RUN, "--max_steps", "30", "--epochs", "20", "--lr", "3", "--eval_every", "1", "--early_stopping", "2"]
    assert main(run) == 0
    printed = capsys.readouterr().out
    step = load_state(Path("model"))["progress"]["step"]
    assert f"stopped at step {step}: 2 validations without a lower loss" in printed
    assert step < 30
    before = Path("model/model.safetensors").read_bytes()
    assert main([*run, "--resume"]) == 0
    assert Path("model/model.safetensors").read_bytes() == before


def test_the_average_is_what_is_validated_sampled_and_saved(
    tiny_config: ReformerLMConfig, make_loop: MakeLoop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def watch(model: torch.nn.Module, *given: Any, **options: Any) -> Validation:
        seen.append(weights_of(model))
        return Validation(1.0, 10)

    monkeypatch.setattr(loop_module, "validate", watch)
    torch.manual_seed(0)
    model = ReformerLMForCausalLM(tiny_config)
    averages = weights_of(model)
    loop = make_loop(model, settings=LoopSettings(batch_size=2, eval_every=1, ema=0.2))
    take = loop.runner.take

    def stepped(*given: Any) -> Any:
        outcome = take(*given)
        decay = min(0.2, (2 + loop.progress.step) / (11 + loop.progress.step))
        for name, weight in weights_of(model).items():
            averages[name] = decay * averages[name] + (1 - decay) * weight
        return outcome

    monkeypatch.setattr(loop.runner, "take", stepped)
    progress = loop.run()
    assert len(seen) == progress.step + 1 == 5
    saved = load_file(tmp_path / "model" / "model.safetensors")
    state = load_state(tmp_path / "model")
    for name, weight in weights_of(model).items():
        torch.testing.assert_close(seen[-1][name], averages[name])
        assert torch.equal(saved[name], seen[-1][name])
        assert torch.equal(state["weights"][name], weight)
        assert not torch.equal(weight, saved[name])


def test_only_matching_parameters_are_trained(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "--output_dir", "first"]) == 0
    assert main([*RUN, "--init_from", "first", "--train_only", r"layers\.1\..*norm", "--output_dir", "second"]) == 0
    before, after = load_file("first/model.safetensors"), load_file("second/model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("layers.1." in name and "norm" in name for name in changed)
    capsys.readouterr()
    assert main([*RUN, "--train_only", "nothing"]) == 2
    assert "--train_only 'nothing' matches no parameter" in capsys.readouterr().err
    assert main([*RUN, "--train_only", "("]) == 2
    assert "regular expression" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--optimizer", "muon"], ["--optimizer", "adafactor"], ["--noise", "0.3"]])
def test_flags_that_change_what_is_learned(flags: list[str], workplace: Path) -> None:
    assert main([*RUN, "--output_dir", "plain"]) == 0
    assert main([*RUN, *flags, "--output_dir", "other"]) == 0
    plain, other = load_file("plain/model.safetensors"), load_file("other/model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in other.values())
    assert any(not torch.equal(plain[name], other[name]) for name in plain)
    # And go on exactly.
    assert main([*RUN, *flags, "--max_steps", "4", "--save_every", "2", "--output_dir", "again"]) == 0
    assert main([*RUN, *flags, "--restore", "again/checkpoints/step-00000002", "--output_dir", "again"]) == 0
    again = load_file("again/model.safetensors")
    assert all(torch.equal(other[name], again[name]) for name in other)


def test_windows_of_one_article_each_are_padded(workplace: Path) -> None:
    assert main([*RUN, "--pad_articles"]) == 0
    assert load_state(Path("model"))["data"]["pad_articles"]


def test_the_named_optimizer_must_fit_the_checkpoint(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "--max_steps", "2"]) == 0
    for flags, fragment in (
        (["--optimizer", "muon"], "optimizer is another one"),
        (["--ema", "0.5"], "the run was without --ema"),
        (["--train_only", "norm"], "optimizer is another one"),
    ):
        capsys.readouterr()
        assert main([*RUN, "--resume", *flags]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and fragment in error
