"""An exponential moving average of the weights (Polyak averaging), which often judges better than the last step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from reformer_lm.training.parallel import like


class WeightAverage:
    """The average of a model's weights over its steps.

    Early on the decay is smaller, (1 + steps) / (10 + steps), so that the initial weights do not linger (Polyak
    averaging with the warm-up of TensorFlow's ExponentialMovingAverage).

    Args:
        model: Whose trainable parameters are averaged.
        decay: Share of the average that a step keeps, from 0 to 1; 0.999 averages over about a thousand steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._averages = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Take in the weights after a step.

        Args:
            steps: Steps done, this one included.
        """
        decay = min(self.decay, (1 + steps) / (10 + steps))
        get_ema_multi_avg_fn(decay)(list(self._averages.values()), list(self._parameters.values()), steps)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averages for weights, and its own again afterwards."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        # Contents and not tensors: optimizer, DistributedDataParallel and FSDP2 hold on to the parameters.
        for name, parameter in self._parameters.items():
            average = self._averages[name]
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)

    def weights(self) -> dict[str, Tensor]:
        """The model's own weights, to be saved beside the averages (which the model's file then holds)."""
        return {name: parameter.detach() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def restore(self, weights: dict[str, Any]) -> None:
        """Set up as saved: the model now has the averages, and gets its own weights back.

        Args:
            weights: From `weights`, whole.
        """
        for name, parameter in self._parameters.items():
            self._averages[name].copy_(parameter)
            parameter.copy_(like(weights[name], parameter))
