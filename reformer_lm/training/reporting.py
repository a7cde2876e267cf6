"""What a run tells the person in front of it: lines, a progress bar, and TensorBoard."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from reformer_lm.training.evaluation import Validation, perplexity

BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}{postfix}]"


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

    def add(self, report: StepReport) -> None:
        self.steps += 1
        self.loss += report.loss * report.tokens
        self.tokens += report.tokens
        self.seconds += report.seconds

    @property
    def mean_loss(self) -> float:
        return self.loss / self.tokens

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class Reporter:
    """Tells of a run on stdout, on a bar on stderr (where that is a terminal), and in TensorBoard.

    Use it as a context manager, so that the bar and TensorBoard's file are closed whatever happens.

    Attributes:
        log_step: A line and a point in the curves every so many steps.
        quiet: Only validations, warnings and the result.
        is_main: Whether this is the process that tells; the others say nothing.
    """

    log_step: int = 10
    quiet: bool = False
    is_main: bool = True
    _bar: tqdm | None = field(default=None, init=False)
    _writer: SummaryWriter | None = field(default=None, init=False)
    _interval: _Interval = field(default_factory=_Interval, init=False)
    _total_steps: int = field(default=0, init=False)

    def __enter__(self) -> Reporter:
        """Nothing is opened before `start`."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the bar and TensorBoard."""
        if self._bar is not None:
            self._bar.close()
        if self._writer is not None:
            self._writer.close()

    def start(self, step: int, total_steps: int, writer_dir: str) -> None:
        """Open the bar and TensorBoard.

        Args:
            step: Steps done so far; points of TensorBoard beyond it, from a run that was killed, are dropped.
            total_steps: Of the run.
            writer_dir: TensorBoard's folder.
        """
        self._total_steps = total_steps
        if not self.is_main:
            return
        self._writer = SummaryWriter(writer_dir, purge_step=step + 1 if step else None)
        # disable=None: no bar where stderr is a file or a pipe, which the lines serve better.
        disable = True if self.quiet else None
        self._bar = tqdm(total=total_steps, initial=step, disable=disable, bar_format=BAR_FORMAT, file=sys.stderr)

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
        self._interval.add(report)
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"loss {report.loss:.3f}, PPL {perplexity(report.loss):.1f}, "
                f"{self._interval.tokens_per_second:,.0f} tokens/s",
                refresh=False,
            )
            self._bar.update()
        if report.step % self.log_step == 0 or report.step == self._total_steps:
            self._write_interval(report)
            self._interval = _Interval()

    def skipped_step(self) -> None:
        """Move the bar past a step that was left out."""
        if self._bar is not None:
            self._bar.update()

    def _write_interval(self, report: StepReport) -> None:
        loss, speed = self._interval.mean_loss, self._interval.tokens_per_second
        seconds_per_step = self._interval.seconds / self._interval.steps
        left = tqdm.format_interval((self._total_steps - report.step) * seconds_per_step)
        self.line(
            f"step {report.step}/{self._total_steps}  loss {loss:.3f}  PPL {perplexity(loss):,.1f}  "
            f"lr {report.learning_rate:.2e}  gradient norm {report.gradient_norm:.2f}  "
            f"{speed:,.0f} tokens/s  {left} left"
        )
        self._scalar("train/loss", loss, report.step)
        self._scalar("train/perplexity", perplexity(loss), report.step)
        self._scalar("train/learning_rate", report.learning_rate, report.step)
        self._scalar("train/gradient_norm", report.gradient_norm, report.step)
        self._scalar("train/tokens_per_second", speed, report.step)

    def validation(self, step: int, validation: Validation) -> None:
        """Tell of a validation."""
        self.result(
            f"step {step}  validation loss {validation.loss:.3f}  PPL {validation.perplexity:,.1f}  "
            f"({validation.tokens:,} tokens)"
        )
        self._scalar("validation/loss", validation.loss, step)
        self._scalar("validation/perplexity", validation.perplexity, step)

    def sample(self, step: int, text: str) -> None:
        """Show what the model writes."""
        self.line(f"step {step}  sample: {' / '.join(text.splitlines())}")
        if self._writer is not None:
            self._writer.add_text("sample", text, step)

    def _scalar(self, name: str, value: float, step: int) -> None:
        if self._writer is not None:
            self._writer.add_scalar(name, value, step)


class Stopwatch:
    """Seconds since it was made or last read."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call, and start anew."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return seconds
