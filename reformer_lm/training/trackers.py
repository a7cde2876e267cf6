"""Where a run's measurements go besides the screen: TensorBoard, and every tracker that accelerate knows by name."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from reformer_lm.errors import InputError
from reformer_lm.training.metrics import Entry
from reformer_lm.training.occupancy import BucketSizes

TENSORBOARD = "tensorboard"
NO_TRACKERS = "none"
PROJECT = "reformer_lm"
# Those whose log() takes text; the others would drop it with a warning, or fail.
TAKE_TEXT = ("wandb", "comet_ml", "trackio")
# Bars of a histogram in TensorBoard.
MAX_BARS = 512

# Of one run, under the names of its options.
Settings = Mapping[str, bool | int | float | str | None]


class Sink(Protocol):
    """Something that takes measurements."""

    def write(self, entry: Entry) -> None:
        """Take an entry."""

    def close(self) -> None:
        """Take no more."""


def available_trackers() -> list[str]:
    """Names that can be given: those whose packages are installed, and what a program registered with accelerate."""
    known_to_accelerate = {str(kind.value) for kind in LoggerType}
    registered = {str(name) for name in LOGGER_TYPE_TO_CLASS} - known_to_accelerate
    installed = {str(kind) for kind in get_available_trackers()} | registered
    return [TENSORBOARD, *sorted(installed - {TENSORBOARD})]


def complaint_about(names: Sequence[str]) -> str | None:
    """What is wrong with the names given to ``--report_to``, None if nothing is."""
    if NO_TRACKERS in names:
        return f"{NO_TRACKERS!r} stands alone" if len(names) > 1 else None
    available = available_trackers()
    missing = [name for name in names if name not in available]
    if not missing and names:
        return None
    choice = f"give some of {', '.join(available)}, or {NO_TRACKERS}"
    if not names:
        return choice
    known = missing[0] in LOGGER_TYPE_TO_CLASS
    return f"{missing[0]!r} {'is not installed here' if known else 'is no known tracker'}; {choice}"


def open_trackers(names: Sequence[str], folder: str, settings: Settings, warn: Callable[[str], None]) -> list[Sink]:
    """Start the trackers of a run that accelerate opens: all but TensorBoard.

    Args:
        names: From ``--report_to``.
        folder: Of those that keep files.
        settings: The run's hyperparameters.
        warn: Told if a tracker fails later on.

    Raises:
        InputError: If one cannot start.
    """
    others = [name for name in dict.fromkeys(names) if name not in (TENSORBOARD, NO_TRACKERS)]
    return [TrackerOfAccelerate(name, folder, settings, warn) for name in others]


class TensorBoard:
    """TensorBoard's event file.

    Not accelerate's tracker of that name: that one puts the settings into a run of their own, beside the curves.

    Args:
        folder: Of the event files.
        settings: The run's hyperparameters.
        step: Steps done so far. What earlier event files in the folder hold beyond it, of a run that was killed or, at
            0, of an earlier run, is no longer shown.
    """

    def __init__(self, folder: str, settings: Settings, step: int) -> None:
        self._earlier_hook = threading.excepthook
        threading.excepthook = self._note_error
        self._writer = SummaryWriter(folder, purge_step=step + 1 if step else 0)
        given = {name: value for name, value in settings.items() if value is not None}
        if not given:
            return
        # What add_hparams does, without its second event file.
        file: Any = self._writer.file_writer
        for summary in hparams(given, {"validation/loss": 0.0, "train/loss": 0.0}):
            file.add_summary(summary, step)

    def write(self, entry: Entry) -> None:
        """Take an entry."""
        for name, value in entry.values.items():
            self._writer.add_scalar(name, value, entry.step, entry.time)
        for name, text in entry.texts.items():
            self._writer.add_text(name, text, entry.step, entry.time)
        for name, sizes in entry.buckets.items():
            self._add_histogram(name, sizes, entry)

    def _add_histogram(self, name: str, sizes: BucketSizes, entry: Entry) -> None:
        # Bars of whole numbers, of which a bucket's size is one; add_histogram's own borders lie between them.
        largest = max(sizes)
        width = -(-(largest + 1) // MAX_BARS)
        counts = [0] * (largest // width + 1)
        for tokens, buckets in sizes.items():
            counts[tokens // width] += buckets
        self._writer.add_histogram_raw(
            name,
            min=min(sizes),
            max=largest,
            num=sum(sizes.values()),
            sum=sum(tokens * buckets for tokens, buckets in sizes.items()),
            sum_squares=sum(tokens**2 * buckets for tokens, buckets in sizes.items()),
            bucket_limits=[(index + 1) * width - 0.5 for index in range(len(counts))],
            bucket_counts=counts,
            global_step=entry.step,
            walltime=entry.time,
        )

    def close(self) -> None:
        """Close the file."""
        try:
            self._writer.close()
        finally:
            threading.excepthook = self._earlier_hook

    def _note_error(self, arguments: threading.ExceptHookArgs) -> None:
        """Say nothing of a full disk twice: the writer's own thread would, and then whoever writes next."""
        written_by = type(arguments.thread).__module__
        if not (issubclass(arguments.exc_type, OSError) and written_by.startswith("tensorboard.")):
            self._earlier_hook(arguments)


class TrackerOfAccelerate:
    """A tracker that accelerate gives one interface: Weights & Biases, Comet, MLflow, Aim, ClearML and so on.

    Args:
        name: As accelerate calls it.
        folder: For those that keep files.
        settings: The run's hyperparameters.
        warn: Told once if the tracker fails during the run, which then goes on without it.

    Raises:
        InputError: If it cannot start: no account, no network.
    """

    def __init__(self, name: str, folder: str, settings: Settings, warn: Callable[[str], None]) -> None:
        self._name = name
        self._warn = warn
        self._tracker: GeneralTracker | None = None
        kind = LOGGER_TYPE_TO_CLASS[name]
        try:
            tracker = kind(PROJECT, folder) if kind.requires_logging_directory else kind(PROJECT)
            tracker.start()
            tracker.store_init_configuration(dict(settings))
        # Each of them has its own errors.
        except Exception as error:
            raise InputError(
                f"--report_to {name}: it does not start ({_one_line(error)}); set it up, or leave it out"
            ) from error
        self._tracker = tracker

    def write(self, entry: Entry) -> None:
        """Take an entry; bucket sizes are left out, for which trackers have no common form."""
        values: dict[str, Any] = {name: value for name, value in entry.values.items() if math.isfinite(value)}
        if self._name in TAKE_TEXT:
            values |= entry.texts
        if self._tracker is not None and values:
            self._attempt(lambda tracker: tracker.log(values, step=entry.step))

    def close(self) -> None:
        """End the tracker's run."""
        self._attempt(lambda tracker: tracker.finish())
        self._tracker = None

    def _attempt(self, action: Callable[[GeneralTracker], None]) -> None:
        """Days of training must not end because a server cannot be reached."""
        if self._tracker is None:
            return
        try:
            action(self._tracker)
        except Exception as error:
            self._tracker = None
            self._warn(f"{self._name} failed and is told nothing more ({_one_line(error)})")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
