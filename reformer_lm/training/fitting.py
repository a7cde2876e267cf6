"""A short loop for batches that are made on the spot: synthetic tasks, notebooks, first experiments.

Texts, checkpoints, several devices and resuming are the business of `reformer_lm.training.TrainingLoop`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from reformer_lm.errors import InputError
from reformer_lm.training.optimization import (
    LearningRateSchedule,
    build_optimizer,
    default_warmup,
    set_learning_rate,
)


def fit(
    model: PreTrainedModel,
    batches: Iterable[dict[str, Tensor]],
    *,
    steps: int,
    learning_rate: float,
    schedule: str = "cosine",
    warmup_steps: int | None = None,
    weight_decay: float = 0.1,
    max_grad_norm: float = 1.0,
    progress: bool = True,
) -> list[float]:
    """Train a model on batches from anywhere, with the optimizer and schedule of ``train_reformer.py``.

    Nothing here draws random numbers: the same model and batches give the same weights.

    Args:
        model: On its device. It is left in evaluation mode.
        batches: Keyword arguments of the model's forward, ``labels`` among them; at least ``steps`` of them.
        steps: Optimizer steps, one batch each.
        learning_rate: Highest learning rate.
        schedule: One of `optimization.SCHEDULES`.
        warmup_steps: Steps of rising learning rate; None for a tenth of all steps, at most 2,000.
        weight_decay: Of the matrices of linear layers.
        max_grad_norm: Gradients are clipped to this norm.
        progress: Whether to show a bar on stderr.

    Returns:
        The loss of each step, in nats.

    Raises:
        InputError: If the batches run out, or a loss is not finite.
    """
    warmup = default_warmup(steps) if warmup_steps is None else warmup_steps
    rates = LearningRateSchedule(learning_rate, total_steps=steps, warmup_steps=warmup, kind=schedule)
    optimizer = build_optimizer(model, learning_rate, weight_decay)
    device = next(model.parameters()).device
    losses: list[float] = []
    model.train()
    bar = tqdm(total=steps, unit="step", disable=not progress, mininterval=0.5)
    with bar:
        for step, batch in enumerate(itertools.islice(batches, steps)):
            set_learning_rate(optimizer, rates.rate(step))
            given: dict[str, Any] = {name: value.to(device) for name, value in batch.items()}
            loss = model(**given, use_cache=False).loss
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise InputError(
                    f"the loss of step {step + 1} is not finite; give a learning rate below {learning_rate:g}"
                )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    model.eval()
    if len(losses) < steps:
        raise InputError(f"{steps} steps were asked for, but there were only {len(losses)} batches; give more of them")
    return losses
