"""One optimizer step: forward and backward pass of all its batches, clipping, update."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import PreTrainedModel

from reformer_lm.model import ReformerLMModel
from reformer_lm.training.averaging import WeightAverage
from reformer_lm.training.batches import BatchMaker
from reformer_lm.training.optimization import set_learning_rate
from reformer_lm.training.pairs import PairBatches
from reformer_lm.training.parallel import Processes


@dataclass(frozen=True)
class StepOutcome:
    """What a step came to, the same in every process.

    Attributes:
        loss: Mean over the step's tokens, in nats.
        gradient_norm: Before clipping.
        tokens: That were predicted, in all processes together.
        is_finite: Whether loss and gradient were; the weights are as before if not.
        stop_requested: Whether some process was told to stop.
    """

    loss: float
    gradient_norm: float
    tokens: int
    is_finite: bool
    stop_requested: bool


class StepRunner:
    """Takes optimizer steps.

    Args:
        processes: That share each step.
        model: As prepared for them.
        bare_model: The same without wrapping.
        optimizer: Of its parameters.
        batches: Makes the inputs.
        max_grad_norm: Gradients are clipped to this norm.
        average: Of the weights, None for none.
    """

    def __init__(
        self,
        *,
        processes: Processes,
        model: nn.Module,
        bare_model: PreTrainedModel,
        optimizer: AcceleratedOptimizer,
        batches: BatchMaker | PairBatches,
        max_grad_norm: float,
        average: WeightAverage | None = None,
    ) -> None:
        self.processes = processes
        self.accelerator = processes.accelerator
        self.model = model
        self.bare_model = bare_model
        self.optimizer = optimizer
        self.batches = batches
        self.max_grad_norm = max_grad_norm
        self.average = average

    def take(self, indices: list[np.ndarray], epoch: int, number: int, rate: float, stop: bool) -> StepOutcome:
        """Take one step.

        Args:
            indices: Windows of each of this process's batches.
            epoch: Number of the epoch, from 0.
            number: Of the step, from 0.
            rate: Learning rate.
            stop: Whether this process was told to stop; the others hear of it with the loss.
        """
        made = [self.batches.make(chosen, epoch) for chosen in indices]
        # Each batch's summed loss is divided by the tokens of all of them, in all processes: the gradient is then that
        # of one large batch, also where batches have uneven numbers of tokens.
        tokens = int(self.processes.sum([sum(count for _, count in made)])[0])
        set_learning_rate(self.optimizer, rate)
        loss = torch.zeros((), device=self.accelerator.device)
        for place, (batch, _) in enumerate(made, start=1):
            for module in self.bare_model.modules():
                if isinstance(module, ReformerLMModel):
                    # Rotations that change with the step must be the same in all of its batches.
                    module.hash_step = number
            batch = {name: x.to(self.accelerator.device, non_blocking=True) for name, x in batch.items()}
            with self.processes.gradients(self.model, complete=place == len(made)):
                with self.accelerator.autocast():
                    # Nothing is generated here, so no model needs to remember keys.
                    output = self.model(**batch, num_items_in_batch=tokens, use_cache=False)
                # DistributedDataParallel and FSDP2 divide the sum of all processes' gradients by their number.
                self.accelerator.backward(output.loss * self.processes.count)
            loss += output.loss.detach()
        mean_loss, stops = self.processes.sum([float(loss), float(stop)])
        norm = self.processes.clip_gradients(self.model, self.max_grad_norm)
        is_finite = math.isfinite(norm) and math.isfinite(mean_loss)
        # The loss scaler of fp16 skips such a step itself, and needs to be told of it to lower its scale.
        if is_finite or self.accelerator.scaler is not None:
            self.optimizer.step()
        self.optimizer.zero_grad()
        if is_finite and self.average is not None:
            self.average.update(number + 1)
        return StepOutcome(mean_loss, norm, tokens, is_finite, stops > 0)
