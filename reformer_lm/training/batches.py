"""Which windows each optimizer step trains on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from reformer_lm.corpus import window_order


def article_numbers(tokens: Tensor, begin_token: int) -> Tensor:
    """Which article of its window each token belongs to, for the model's ``document_ids``.

    Args:
        tokens: int64 [B, T].
        begin_token: the token every article begins with.

    Returns:
        int64 [B, T], rising from left to right; 0 is what is left of an article that began before the window.
    """
    return (tokens == begin_token).cumsum(dim=1)


@dataclass(frozen=True, eq=False)
class StepWindows:
    """The windows of one optimizer step.

    Attributes:
        epoch: Number of the epoch, from 0.
        batches: Window indices of each batch; together they act as one large batch.
        windows_done: Windows of the epoch that are done after this step.
    """

    epoch: int
    batches: tuple[np.ndarray, ...]
    windows_done: int


@dataclass(frozen=True)
class TrainingPlan:
    """The division of a run into epochs, steps and batches.

    The last step of an epoch takes the windows that are left, and its last batch may be smaller.

    Attributes:
        num_windows: Windows in an epoch.
        batch_size: Windows in a batch.
        gradient_accumulation: Batches in a step.
        epochs: Times to go through all windows.
        seed: Of the order.
        max_steps: Stop earlier, after this many steps; None for no limit.
    """

    num_windows: int
    batch_size: int
    gradient_accumulation: int
    epochs: int
    seed: int
    max_steps: int | None = None

    @property
    def windows_per_step(self) -> int:
        """Windows of a full step."""
        return self.batch_size * self.gradient_accumulation

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch."""
        return self._steps(self.num_windows)

    def _steps(self, windows: int) -> int:
        return -(-windows // self.windows_per_step)

    def total_steps(self, step: int = 0, epoch: int = 0, windows_done: int = 0) -> int:
        """Steps of the whole run.

        Args:
            step: Steps done so far, perhaps with other batch sizes.
            epoch: Epoch those ended in.
            windows_done: Windows of that epoch that are done.
        """
        left = self._steps(max(self.num_windows - windows_done, 0)) if epoch < self.epochs else 0
        total = step + left + max(self.epochs - epoch - 1, 0) * self.steps_per_epoch
        return total if self.max_steps is None else min(total, self.max_steps)

    def steps(self, epoch: int = 0, windows_done: int = 0) -> Iterator[StepWindows]:
        """All steps from a position to the end of the last epoch; `max_steps` is the caller's to keep.

        Args:
            epoch: Where to begin.
            windows_done: Windows of that epoch to leave out, because they are done.
        """
        for number in range(epoch, self.epochs):
            order = window_order(self.num_windows, self.seed, number)
            start = windows_done if number == epoch else 0
            for first in range(start, self.num_windows, self.windows_per_step):
                chosen = order[first : first + self.windows_per_step]
                batches = [chosen[i : i + self.batch_size] for i in range(0, len(chosen), self.batch_size)]
                yield StepWindows(number, tuple(batches), first + len(chosen))
