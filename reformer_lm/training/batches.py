"""Which windows each optimizer step trains on, and what the model gets of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from reformer_lm.corpus import window_order
from reformer_lm.training.masking import IGNORED, Masking

# Keeps the random numbers of noise and masks apart from those of the window order, which come of the same seed.
_NOISE_STREAM = 1
_MASK_STREAM = 2


class Windows(Protocol):
    """Training windows, however they were cut from the corpus."""

    @property
    def length(self) -> int:
        """Tokens of the longest one."""

    @property
    def stride(self) -> int:
        """Tokens from the start of one to the start of the next."""

    def __len__(self) -> int:
        """Number of windows."""

    def batch(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """Some of them as rows: LongTensor [len(indices), longest], padded at the end."""


def article_numbers(tokens: Tensor, begin_token: int) -> Tensor:
    """Which article of its window each token belongs to, for the model's ``document_ids``.

    Args:
        tokens: int64 [B, T].
        begin_token: the token every article begins with.

    Returns:
        int64 [B, T], rising from left to right; 0 is what is left of an article that began before the window.
    """
    return (tokens == begin_token).cumsum(dim=1)


@dataclass(frozen=True)
class BatchMaker:
    """Makes the model's inputs from windows.

    Attributes:
        windows: Of the training stream.
        begin_token: The token articles begin with, if those in one window are not to see each other, else None.
        pad_token: The token that windows are padded with, None if none are.
        noise: Probability, 0 to 1, that an input token is replaced by a random one; what is to be predicted stays.
        seed: Of the noise.
        special_tokens: Ids that the noise neither replaces nor puts in.
        vocab_size: Number of tokens.
        masking: Hides what a masked language model is to fill in; None for one that predicts the next token.
    """

    windows: Windows
    begin_token: int | None = None
    pad_token: int | None = None
    noise: float = 0.0
    seed: int = 0
    special_tokens: tuple[int, ...] = ()
    vocab_size: int = 0
    masking: Masking | None = None

    def make(self, indices: np.ndarray, epoch: int) -> tuple[dict[str, Tensor], int]:
        """Inputs of a batch, and how many tokens it predicts.

        Args:
            indices: Of windows; none at all gives a batch that has no effect, for a process that has nothing to do in a
                step but must take part in it.
            epoch: Number of the epoch, from 0; noise and masks are functions of seed, epoch and window alone, so that
                they are the same after a resume and with any number of processes.
        """
        filler = len(indices) == 0
        tokens = self.windows.batch(indices if not filler else np.zeros(1, dtype=np.int64))
        labels = tokens
        inputs = {}
        if self.pad_token is not None:
            present = tokens != self.pad_token
            labels = tokens.masked_fill(~present, IGNORED)
            inputs["attention_mask"] = present.long()
        if self.begin_token is not None:
            inputs["document_ids"] = article_numbers(tokens, self.begin_token)
        if filler:
            labels = torch.full_like(tokens, IGNORED)
        elif self.masking is not None:
            rows = [
                self.masking.hide(row, [self.seed, epoch, int(index), _MASK_STREAM])
                for row, index in zip(tokens, indices, strict=True)
            ]
            tokens, labels = (torch.stack(list(part)) for part in zip(*rows, strict=True))
        if self.noise and not filler:
            tokens = torch.stack([self._noisy(row, index, epoch) for row, index in zip(tokens, indices, strict=True)])
        count = count_labels(labels) if self.masking is None else int((labels != IGNORED).sum())
        return {"input_ids": tokens, "labels": labels, **inputs}, count

    def _noisy(self, row: Tensor, index: int, epoch: int) -> Tensor:
        random = np.random.default_rng([self.seed, epoch, int(index), _NOISE_STREAM])
        ordinary = np.setdiff1d(np.arange(self.vocab_size), self.special_tokens)
        chosen = torch.from_numpy(random.random(len(row)) < self.noise)
        chosen &= ~torch.isin(row, torch.tensor(self.special_tokens, dtype=row.dtype))
        return torch.where(chosen, torch.from_numpy(random.choice(ordinary, len(row))), row)


def count_labels(labels: Tensor) -> int:
    """Tokens of labels [B, T] that are predicted: those that count, but for the first of each row."""
    return int((labels[:, 1:] != IGNORED).sum())


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

    def of_process(self, rank: int, count: int) -> list[np.ndarray]:
        """The batches of one of several processes: as many in each, so that none waits for the others in vain.

        Args:
            rank: Number of the process, from 0.
            count: Of processes.

        Returns:
            Window indices; an empty array where there is no batch left for this process.
        """
        own = list(self.batches[rank::count])
        missing = -(-len(self.batches) // count) - len(own)
        return own + [np.zeros(0, dtype=np.int64)] * missing


@dataclass(frozen=True)
class TrainingPlan:
    """The division of a run into epochs, steps and batches.

    The last step of an epoch takes the windows that are left, and its last batch may be smaller.

    Attributes:
        num_windows: Windows in an epoch.
        batch_size: Windows in a batch.
        gradient_accumulation: Batches in a step, of each process.
        epochs: Times to go through all windows.
        seed: Of the order.
        max_steps: Stop earlier, after this many steps; None for no limit.
        num_processes: Processes that share each step's batches.
    """

    num_windows: int
    batch_size: int
    gradient_accumulation: int
    epochs: int
    seed: int
    max_steps: int | None = None
    num_processes: int = 1

    @property
    def windows_per_step(self) -> int:
        """Windows of a full step."""
        return self.batch_size * self.gradient_accumulation * self.num_processes

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
