import io
import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reformer_lm.training import reporting
from reformer_lm.training.evaluation import Validation
from reformer_lm.training.reporting import Reporter, StepReport


def report(step: int, loss: float = 2.0, tokens: int = 100, seconds: float = 0.5) -> StepReport:
    return StepReport(step, loss, gradient_norm=0.25, learning_rate=1e-3, tokens=tokens, seconds=seconds)


def test_lines_and_curves_are_means_weighted_by_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter(log_step=2) as reporter:
        reporter.start(0, 5, str(tmp_path))
        reporter.validation(0, Validation(5.123, 6900))
        for step in range(1, 6):
            reporter.step(report(step, loss=1.0 if step % 2 else 4.0, tokens=300 if step % 2 else 100))
        reporter.sample(5, "春天\n花")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "step 0  validation loss 5.123  PPL 167.8  (6,900 tokens)",
        "step 2/5  loss 1.750  PPL 5.8  lr 1.00e-03  gradient norm 0.25  400 tokens/s  00:01 left",
        "step 4/5  loss 1.750  PPL 5.8  lr 1.00e-03  gradient norm 0.25  400 tokens/s  00:00 left",
        "step 5/5  loss 1.000  PPL 2.7  lr 1.00e-03  gradient norm 0.25  600 tokens/s  00:00 left",
        "step 5  sample: 春天 / 花",
    ]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == [
        "train/gradient_norm",
        "train/learning_rate",
        "train/loss",
        "train/perplexity",
        "train/tokens_per_second",
        "validation/loss",
        "validation/perplexity",
    ]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(2, 1.75), (4, 1.75), (5, 1.0)]
    assert [event.step for event in events.Scalars("validation/loss")] == [0]
    (sample,) = events.Tensors("sample/text_summary")
    assert sample.tensor_proto.string_val[0].decode() == "春天\n花"


def test_bar_shows_loss_perplexity_speed_and_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(reporting.sys, "stderr", terminal)
    with Reporter(log_step=100) as reporter:
        reporter.start(3, 10, str(tmp_path))
        reporter.step(report(4))
        reporter.skipped_step()
        assert reporter._bar is not None
        assert reporter._bar.n == 5
        reporter._bar.refresh()
    assert re.search(r"5/10 steps \[\d\d:\d\d<[\d?:]+, loss 2.000, PPL 7.4, 200 tokens/s\]", terminal.getvalue())


def test_quiet_says_only_what_matters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter(log_step=1, quiet=True) as reporter:
        reporter.start(0, 1, str(tmp_path))
        reporter.line("chatter")
        reporter.step(report(1))
        reporter.sample(1, "春")
        reporter.validation(1, Validation(0.0, 1))
        reporter.result("done")
        reporter.warn("look")
    captured = capsys.readouterr()
    assert captured.out.splitlines() == ["step 1  validation loss 0.000  PPL 1.0  (1 tokens)", "done"]
    assert captured.err.splitlines() == ["note: look"]


def test_resumed_curves_drop_what_the_killed_run_wrote_beyond(tmp_path: Path) -> None:
    for start, losses in ((0, [9.0, 8.0, 7.0]), (1, [6.0, 5.0])):
        with Reporter(log_step=1, quiet=True) as reporter:
            reporter.start(start, 3, str(tmp_path))
            for number, loss in enumerate(losses, start=start + 1):
                reporter.step(report(number, loss))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 9.0), (2, 6.0), (3, 5.0)]
