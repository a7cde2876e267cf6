"""Everything besides the weights that decides how a run goes on: position, optimizer, random numbers."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from reformer_lm.errors import InputError

STATE_VERSION = 2


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: Optimizer steps done, skipped ones included.
        epoch: Number of the current epoch, from 0.
        windows_done: Windows of the current epoch that have been trained on.
        tokens_seen: Tokens trained on.
        skipped_steps: Steps left out because loss or gradient was not finite.
        first_loss: Of the first validation, in nats per token.
        last_loss: Of the last.
        best_loss: The lowest.
        best_step: Where that was.
        validations_since_best: Validations after it.
        validation_is_due: Whether the run was told to stop before the validation of this step.
    """

    step: int = 0
    epoch: int = 0
    windows_done: int = 0
    tokens_seen: int = 0
    skipped_steps: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    validations_since_best: int = 0
    validation_is_due: bool = False

    def record_validation(self, loss: float) -> bool:
        """Note the loss of a validation after the current step, and say whether it is the lowest so far."""
        if self.first_loss is None:
            self.first_loss = loss
        self.last_loss = loss
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.best_step, self.validations_since_best = loss, self.step, 0
            return True
        self.validations_since_best += 1
        return False


@dataclass(frozen=True)
class DataIdentity:
    """What the order and content of the windows depend on. A run can only be resumed on the same.

    Attributes:
        num_tokens: Of the training stream.
        corpus: Checksum of the shards.
        max_seq_len: Tokens per window.
        stride: Tokens from window to window.
        seed: Of the window order.
        pad_articles: Whether windows are articles.
        task: What is learned from them.
    """

    num_tokens: int
    corpus: str
    max_seq_len: int
    stride: int
    seed: int
    pad_articles: bool = False
    task: str = "clm"

    def require_same(self, saved: dict[str, Any]) -> None:
        """Refuse to resume on other data.

        Raises:
            InputError: Naming the first difference.
        """
        remedy = "give the same, or start anew from the weights with --init_from"
        # Runs of earlier versions had no other task.
        saved = {"task": "clm", **saved}
        for name in ("task", "max_seq_len", "stride", "seed", "pad_articles"):
            if saved[name] != getattr(self, name):
                raise InputError(f"--resume: --{name} was {saved[name]}, now {getattr(self, name)}; {remedy}")
        if saved != dataclasses.asdict(self):
            raise InputError(
                f"--resume: the training corpus was another one ({saved['num_tokens']:,} tokens, now "
                f"{self.num_tokens:,}); {remedy}"
            )


def capture_random_state() -> dict[str, Any]:
    """States of the global random number generators, as plain values and tensors."""
    numpy_state = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": _plain(numpy_state),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put all global random number generators back where `capture_random_state` found them."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy_state = dict(state["numpy"])
    key = np.asarray(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy_state, "state": {**numpy_state["state"], "key": key}})
    torch.set_rng_state(state["torch"])
    # A run may move between CPU and CUDA; the numbers then differ, as they do for other reasons.
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])


def _plain(value: Any) -> Any:
    """Replace numpy's arrays and numbers by lists and numbers that torch.load accepts."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
