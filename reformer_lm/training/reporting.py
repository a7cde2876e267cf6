"""What a run tells the person in front of it: lines, a progress bar, trackers, a metrics file and a page."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType

import torch
from tqdm import tqdm

from reformer_lm.errors import InputError
from reformer_lm.training.evaluation import Validation, perplexity
from reformer_lm.training.metrics import METRICS_NAME, Entry, MetricsFile, read_metrics, replace_file
from reformer_lm.training.report_page import RunReport, build_page
from reformer_lm.training.run_folder import RunFolder
from reformer_lm.training.state import Progress
from reformer_lm.training.trackers import TENSORBOARD, Settings, Sink, TensorBoard, open_trackers

BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}{postfix}]"
REPORT_NAME = "report.html"
_MIB = 2**20

# Windows has no such module.
if sys.platform != "win32":
    import resource


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step has to say.

    Attributes:
        step: Steps done.
        loss: Mean over the step's tokens, in nats.
        gradient_norm: Before clipping.
        learning_rate: Of the step.
        tokens: Predicted in the step.
        seconds: That the step took.
    """

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    tokens: int
    seconds: float


@dataclass
class _Interval:
    """Sums since the last line."""

    loss: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    steps: int = 0
    last: StepReport | None = None

    def add(self, report: StepReport) -> None:
        self.steps += 1
        self.loss += report.loss * report.tokens
        self.tokens += report.tokens
        self.seconds += report.seconds
        self.last = report

    @property
    def mean_loss(self) -> float:
        return self.loss / self.tokens

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class Reporter:
    """Tells of a run on stdout, on a bar on stderr (where that is a terminal), to trackers, and in the run's folder.

    Use it as a context manager, so that the bar and all files are closed, and the page written, whatever happens.

    Attributes:
        log_step: A line and a point in the curves every so many steps.
        quiet: Only validations, warnings and the result.
        is_main: Whether this is the process that speaks; the others of a distributed run say and write nothing.
        report_to: Names of trackers.
    """

    log_step: int = 10
    quiet: bool = False
    is_main: bool = True
    report_to: Sequence[str] = (TENSORBOARD,)
    _bar: tqdm | None = field(default=None, init=False)
    _interval: _Interval = field(default_factory=_Interval, init=False)
    _progress: Progress = field(default_factory=Progress, init=False)
    _total_steps: int = field(default=0, init=False)
    _seconds: float = field(default=0.0, init=False)
    _writer_dir: str = field(default="", init=False)
    _folder: RunFolder | None = field(default=None, init=False)
    _trackers: list[Sink] = field(default_factory=list, init=False)
    _sinks: list[Sink] | None = field(default=None, init=False)
    # What was reported before the first step. It is written with that: a run that is stopped before it takes one must
    # not replace an earlier run's files.
    _waiting: list[Entry] = field(default_factory=list, init=False)

    def __enter__(self) -> Reporter:
        """Nothing is opened before `start`."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the bar and everything that is written to, and write the page."""
        if self._bar is not None:
            self._bar.close()
        is_open = self._sinks is not None
        if is_open:
            self._write_rest()
        for sink in self._trackers if self._sinks is None else self._sinks:
            with contextlib.suppress(OSError):
                sink.close()
        self._sinks, self._trackers = None, []
        if is_open:
            self._write_page(error)

    def start(
        self,
        step: int,
        total_steps: int,
        writer_dir: str,
        *,
        folder: RunFolder | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Open the bar and the trackers.

        Args:
            step: Steps done so far; what TensorBoard and the metrics file hold beyond it, from a run that was killed,
                is dropped.
            total_steps: Of the run.
            writer_dir: TensorBoard's folder.
            folder: Where the run's other files go; None for none.
            progress: What a resumed run has behind it.

        Raises:
            InputError: If a tracker cannot start, or the folder cannot be written.
        """
        if not self.is_main:
            return
        self._total_steps = total_steps
        self._progress = Progress(step=step) if progress is None else dataclasses.replace(progress)
        self._writer_dir, self._folder = writer_dir, folder
        # At once, since they may want an account or a network.
        self._trackers = open_trackers(self.report_to, writer_dir, self._settings(), self.warn)
        if step:
            self._open()
        if folder is not None:
            board = f", tensorboard --logdir {writer_dir}" if TENSORBOARD in self.report_to else ""
            self.line(f"watch it: {folder.path / METRICS_NAME}{board}; a page at the end: {folder.path / REPORT_NAME}")
        # disable=None: no bar where stderr is a file or a pipe, which the lines serve better.
        disable = True if self.quiet else None
        self._bar = tqdm(total=total_steps, initial=step, disable=disable, bar_format=BAR_FORMAT, file=sys.stderr)

    def _settings(self) -> Settings:
        return {} if self._folder is None else self._folder.hyperparameters()

    def _open(self) -> None:
        """Begin to write, replacing what an earlier run left unless this one goes on with it."""
        step, folder = self._progress.step, self._folder
        self._sinks = list(self._trackers)
        if TENSORBOARD in self.report_to:
            self._sinks.insert(0, TensorBoard(self._writer_dir, self._settings(), step))
        if folder is not None:
            path = folder.path / METRICS_NAME
            try:
                folder.write()
                # First, so that nothing can keep a line from it.
                self._sinks.insert(0, MetricsFile(path, step if folder.is_resumed else None))
            except OSError as error:
                raise InputError(
                    f"{folder.path}: the run's files cannot be written ({error.strerror}); give another --output_dir"
                ) from error
            seconds = [line["train/seconds"] for line in read_metrics(path) if "train/seconds" in line]
            self._seconds = seconds[-1] if seconds else 0.0
        for entry in self._waiting:
            self._tell(entry)
        self._waiting = []

    def _tell(self, entry: Entry) -> None:
        if self._bar is None and self._sinks is None:
            # Not started, or not the process that speaks.
            return
        if self._sinks is None:
            self._waiting.append(entry)
            return
        for sink in list(self._sinks):
            try:
                sink.write(entry)
            # A disk that is full stops the run when a checkpoint is due, which says so; until then it may get room.
            except OSError as error:
                self._sinks.remove(sink)
                self.warn(f"{type(sink).__name__} is written no further ({error.strerror or error})")

    def line(self, text: str) -> None:
        """Print a line, unless quiet."""
        if not self.quiet:
            self.result(text)

    def result(self, text: str) -> None:
        """Print a line in any case."""
        if self.is_main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def warn(self, text: str) -> None:
        """Print a line about something that the user should look at."""
        if self.is_main:
            tqdm.write(f"note: {text}", file=sys.stderr)

    def step(self, report: StepReport) -> None:
        """Tell of a step."""
        if not self.is_main:
            return
        self._advance(report.step)
        self._interval.add(report)
        self._seconds += report.seconds
        self._progress.tokens_seen += report.tokens
        if self._bar is not None:
            left_out = f", {self._progress.skipped_steps} left out" if self._progress.skipped_steps else ""
            self._bar.set_postfix_str(
                f"loss {report.loss:.3f}, PPL {perplexity(report.loss):.1f}, "
                f"{self._interval.tokens_per_second:,.0f} tokens/s{left_out}",
                refresh=False,
            )
            self._bar.update()
        self._end_interval_if_due()

    def skipped_step(self) -> None:
        """Tell of a step that was left out."""
        if not self.is_main:
            return
        self._progress.skipped_steps += 1
        self._advance(self._progress.step + 1)
        if self._bar is not None:
            self._bar.update()
        self._tell(Entry(self._progress.step, {"train/skipped_steps": self._progress.skipped_steps}))
        self._end_interval_if_due()

    def _advance(self, step: int) -> None:
        if self._sinks is None and self._bar is not None:
            self._open()
        self._progress.step = step

    def _end_interval_if_due(self) -> None:
        step = self._progress.step
        if step % self.log_step and step != self._total_steps:
            return
        # With each of its steps left out, an interval has nothing to tell.
        if self._interval.last is not None:
            self._print_interval(self._interval.last)
            self._tell(self._measured(self._interval.last))
        self._interval = _Interval()

    def _print_interval(self, report: StepReport) -> None:
        loss, speed, step = self._interval.mean_loss, self._interval.tokens_per_second, self._progress.step
        seconds_per_step = self._interval.seconds / self._interval.steps
        left = tqdm.format_interval((self._total_steps - step) * seconds_per_step)
        left_out = f"  {self._progress.skipped_steps} left out" if self._progress.skipped_steps else ""
        self.line(
            f"step {step}/{self._total_steps}  loss {loss:.3f}  PPL {perplexity(loss):,.1f}  "
            f"lr {report.learning_rate:.2e}  gradient norm {report.gradient_norm:.2f}  "
            f"{speed:,.0f} tokens/s  {left} left{left_out}"
        )

    def _measured(self, report: StepReport) -> Entry:
        loss = self._interval.mean_loss
        values = {
            "train/loss": loss,
            "train/perplexity": perplexity(loss),
            "train/learning_rate": report.learning_rate,
            "train/gradient_norm": report.gradient_norm,
            "train/tokens_per_second": self._interval.tokens_per_second,
            "train/tokens_seen": self._progress.tokens_seen,
            "train/seconds": round(self._seconds, 3),
        }
        return Entry(self._progress.step, values | peak_memory())

    def _write_rest(self) -> None:
        """The steps since the last line, of a run that ends between two: a resumed one begins after them."""
        if self._interval.last is not None:
            self._tell(self._measured(self._interval.last))

    def validation(self, step: int, validation: Validation) -> None:
        """Tell of a validation, and whether it is the best so far."""
        if not self.is_main:
            return
        best, best_step = self._progress.best_loss, self._progress.best_step
        note = ""
        if best is not None:
            note = "  best so far" if validation.loss < best else f"  best: step {best_step}"
        if best is None or validation.loss < best:
            self._progress.best_loss, self._progress.best_step = validation.loss, step
        self.result(
            f"step {step}  validation loss {validation.loss:.3f}  PPL {validation.perplexity:,.1f}  "
            f"({validation.tokens:,} tokens){note}"
        )
        values = {"validation/loss": validation.loss, "validation/perplexity": validation.perplexity}
        buckets = {f"buckets/layer_{layer}": sizes for layer, sizes in validation.buckets.items()}
        self._tell(Entry(step, values, buckets=buckets))

    def sample(self, step: int, text: str) -> None:
        """Show what the model writes."""
        if self.is_main:
            self.line(f"step {step}  sample: {' / '.join(text.splitlines())}")
            self._tell(Entry(step, texts={"sample": text}))

    def _write_page(self, error: BaseException | None) -> None:
        folder = self._folder
        if folder is None:
            return
        lines = read_metrics(folder.path / METRICS_NAME)
        report = RunReport(self._outcome(error), self._total_steps, lines, folder.settings, folder.starts())
        try:
            replace_file(folder.path / REPORT_NAME, build_page(report))
        # The model is worth more than the page about it.
        except Exception as reason:
            self.warn(f"{folder.path / REPORT_NAME}: the page could not be written ({type(reason).__name__}: {reason})")

    def _outcome(self, error: BaseException | None) -> str:
        step = self._progress.step
        place = f"at step {step:,} of {self._total_steps:,}"
        if error is None:
            return f"Finished after {step:,} steps" if step >= self._total_steps else f"Stopped and saved {place}"
        if isinstance(error, KeyboardInterrupt):
            return f"Interrupted {place}"
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"Ended by an error {place}: {reason}"


def peak_memory() -> dict[str, float]:
    """The most memory that the process and, where there is one in use, its CUDA device have held so far, in MiB."""
    peaks = {}
    if sys.platform != "win32":
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # Bytes on macOS, KiB elsewhere.
        peaks["memory/process_peak_mib"] = size / (_MIB if sys.platform == "darwin" else 1024)
    if torch.cuda.is_initialized():
        peaks["memory/cuda_peak_mib"] = torch.cuda.max_memory_allocated() / _MIB
    return peaks


class Stopwatch:
    """Seconds since it was made or last read."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call, and start anew."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return seconds
