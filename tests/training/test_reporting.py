import io
import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reformer_lm.errors import InputError
from reformer_lm.training import reporting
from reformer_lm.training.evaluation import Validation
from reformer_lm.training.metrics import read_metrics
from reformer_lm.training.reporting import Reporter, StepReport
from reformer_lm.training.run_folder import RunFolder
from reformer_lm.training.state import Progress


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
        "memory/process_peak_mib",
        "train/gradient_norm",
        "train/learning_rate",
        "train/loss",
        "train/perplexity",
        "train/seconds",
        "train/tokens_per_second",
        "train/tokens_seen",
        "validation/loss",
        "validation/perplexity",
    ]
    assert [event.value for event in events.Scalars("train/tokens_seen")] == [400, 800, 1100]
    assert [event.value for event in events.Scalars("train/seconds")] == [1.0, 2.0, 2.5]
    assert all(event.value > 1 for event in events.Scalars("memory/process_peak_mib"))
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


def folder(path: Path, is_resumed: bool = False) -> RunFolder:
    path.mkdir(exist_ok=True)
    settings = {"model": {"hidden_size": 16}, "training": {"lr": 0.5, "output_dir": "a<b"}}
    return RunFolder(path, settings, {"step": 0, "arguments": ["--raw"]}, is_resumed)


def test_the_best_validation_is_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter(log_step=1) as reporter:
        reporter.start(20, 90, str(tmp_path), progress=Progress(step=20, best_loss=3.0, best_step=10))
        for step, loss in ((30, 3.5), (40, 2.0), (50, 2.0), (60, 1.5)):
            reporter.validation(step, Validation(loss, 7))
    marks = [line.partition("(7 tokens)")[2].strip() for line in capsys.readouterr().out.splitlines()]
    assert marks == ["best: step 10", "best so far", "best: step 40", "best so far"]


def test_steps_left_out_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter(log_step=2) as reporter:
        reporter.start(0, 6, str(tmp_path), folder=folder(tmp_path / "run"))
        reporter.step(report(1))
        # The interval ends with a step that has nothing to tell.
        reporter.skipped_step()
        reporter.skipped_step()
        reporter.skipped_step()
        reporter.step(report(5, loss=4.0))
        reporter.step(report(6, loss=6.0))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.partition("  lr")[0] for line in lines] == [
        "step 2/6  loss 2.000  PPL 7.4",
        "step 6/6  loss 5.000  PPL 148.4",
    ]
    assert [line.rpartition("  ")[2] for line in lines] == ["1 left out", "3 left out"]
    measured = read_metrics(tmp_path / "run" / "metrics.jsonl")
    counts = [(line["step"], line["train/skipped_steps"]) for line in measured if "train/skipped_steps" in line]
    assert counts == [(2, 1), (3, 2), (4, 3)]
    assert [(line["step"], line["train/loss"]) for line in measured if "train/loss" in line] == [(2, 2.0), (6, 5.0)]


def test_the_metrics_file_says_what_tensorboard_shows(tmp_path: Path) -> None:
    sizes = {0: {0: 2, 5: 6}, 1: {3: 8}}
    with Reporter(log_step=2, quiet=True) as reporter:
        reporter.start(0, 4, str(tmp_path / "board"), folder=folder(tmp_path / "run"))
        reporter.validation(0, Validation(5.5, 70, sizes))
        for step in range(1, 5):
            reporter.step(report(step, loss=float(step)))
        reporter.sample(4, "春<b>")
        reporter.validation(4, Validation(1.25, 70))
    measured = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in measured] == [0, 2, 4, 4, 4]
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    for tag in events.Tags()["scalars"]:
        ours = [(line["step"], line[tag], line["time"]) for line in measured if tag in line]
        theirs = [(event.step, event.value, event.wall_time) for event in events.Scalars(tag)]
        assert len(ours) == len(theirs) > 0, tag
        for one, other in zip(ours, theirs, strict=True):
            assert one == pytest.approx(other, rel=1e-6, abs=1e-3)
    assert measured[0]["buckets/layer_0"] == [[0, 2], [5, 6]]
    for layer in (0, 1):
        (event,) = events.Histograms(f"buckets/layer_{layer}")
        assert event.histogram_value.num == 8
        assert event.histogram_value.sum == sum(tokens * count for tokens, count in sizes[layer].items())
    assert [line["sample"] for line in measured if "sample" in line] == ["春<b>"]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "metrics.jsonl",
        "report.html",
        "run.json",
        "run_config.json",
    }


def test_a_resumed_run_goes_on_with_the_file(tmp_path: Path) -> None:
    def run(start: int, steps: range, last: int, progress: Progress | None = None) -> None:
        with Reporter(log_step=2, quiet=True) as reporter:
            target = folder(tmp_path / "run", is_resumed=start > 0)
            reporter.start(start, last, str(tmp_path / "board"), folder=target, progress=progress)
            for step in steps:
                reporter.step(report(step, loss=float(step)))

    # Stopped at 5 after the checkpoint of 3: step 3, between two lines, is told of none the less.
    run(0, range(1, 4), 9)
    run(3, range(4, 6), 9, Progress(step=3, tokens_seen=300))
    run(3, range(4, 10), 9, Progress(step=3, tokens_seen=300))
    measured = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [(line["step"], line["train/loss"]) for line in measured] == [
        (2, 1.5), (3, 3.0), (4, 4.0), (6, 5.5), (8, 7.5), (9, 9.0)
    ]  # fmt: skip
    assert [line["train/tokens_seen"] for line in measured] == [200, 300, 400, 600, 800, 900]
    assert [line["train/seconds"] for line in measured] == [1, 1.5, 2, 3, 4, 4.5]
    # Each start is on record, with the settings once.
    assert len(RunFolder(tmp_path / "run", {}, {}).starts()) == 3


def test_a_run_that_takes_no_step_replaces_nothing(tmp_path: Path) -> None:
    for steps in (2, 0):
        with Reporter(log_step=1, quiet=True) as reporter:
            reporter.start(0, 2, str(tmp_path / "board"), folder=folder(tmp_path / "run"))
            reporter.validation(0, Validation(1.0 + steps, 7))
            for step in range(1, steps + 1):
                reporter.step(report(step))
        if steps:
            before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert len(before) == 5


def test_the_page_is_written_however_the_run_ends(tmp_path: Path) -> None:
    def run(total: int, error: BaseException | None = None) -> str:
        with Reporter(log_step=1, quiet=True) as reporter:
            reporter.start(0, total, str(tmp_path / "board"), folder=folder(tmp_path / "run"))
            reporter.validation(0, Validation(2.0, 7))
            reporter.step(report(1))
            if error is not None:
                raise error
        return (tmp_path / "run" / "report.html").read_text(encoding="utf-8")

    assert "Finished after 1 steps" in run(1)
    assert "Stopped and saved at step 1 of 5" in run(5)
    for error, outcome in (
        (InputError("out of <memory>"), "Ended by an error at step 1 of 5: out of &lt;memory&gt;"),
        (KeyboardInterrupt(), "Interrupted at step 1 of 5"),
    ):
        with pytest.raises(type(error)):
            run(5, error)
        assert outcome in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_other_processes_say_and_write_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Reporter(log_step=1, is_main=False) as reporter:
        reporter.start(0, 2, str(tmp_path / "board"), folder=RunFolder(tmp_path / "run", {"model": {}}, {}))
        reporter.line("a")
        reporter.result("b")
        reporter.warn("c")
        reporter.validation(0, Validation(1.0, 7))
        reporter.step(report(1))
        reporter.skipped_step()
        reporter.sample(2, "春")
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_none_turns_the_trackers_off_and_keeps_the_run_s_own_files(tmp_path: Path) -> None:
    with Reporter(log_step=1, quiet=True, report_to=("none",)) as reporter:
        reporter.start(0, 1, str(tmp_path / "board"), folder=folder(tmp_path / "run"))
        reporter.step(report(1))
    assert not (tmp_path / "board").exists()
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 1


def test_a_full_disk_ends_the_file_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with Reporter(log_step=1, quiet=True, report_to=("none",)) as reporter:
        reporter.start(0, 3, str(tmp_path), folder=folder(tmp_path / "run"))
        reporter.step(report(1))
        monkeypatch.setattr(reporting.MetricsFile, "write", full)
        reporter.step(report(2))
        reporter.step(report(3))
        monkeypatch.setattr(reporting, "replace_file", full)
    notes = capsys.readouterr().err.splitlines()
    assert notes[0] == "note: MetricsFile is written no further (No space left on device)"
    assert "report.html: the page could not be written" in notes[1]
    assert len(notes) == 2
