"""The optimizer and its learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

# 0.95 instead of 0.999: language models see few steps, and the gradient's scale changes fast at their
# beginning (Brown et al. 2020, appendix B).
BETAS = (0.9, 0.95)
EPSILON = 1e-8


@dataclass(frozen=True)
class LearningRateSchedule:
    """Linear warm-up to a peak, then decay to a floor.

    It is a function of the step alone, so that it has no state to save.

    Attributes:
        peak: Highest learning rate.
        total_steps: Optimizer steps of the whole run.
        warmup_steps: Steps of the rise; the peak is reached at this step.
        kind: ``cosine``, ``linear`` or ``constant`` (no decay).
        floor_ratio: The last step's rate as a share of the peak.
    """

    peak: float
    total_steps: int
    warmup_steps: int
    kind: str = "cosine"
    floor_ratio: float = 0.1

    def rate(self, step: int) -> float:
        """Learning rate of one optimizer step.

        Args:
            step: Counted from 0.
        """
        if step < self.warmup_steps:
            # Never 0: a first step that learns nothing would be wasted.
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        decay_steps = self.total_steps - 1 - self.warmup_steps
        progress = min((step - self.warmup_steps) / decay_steps, 1.0) if decay_steps > 0 else 0.0
        if self.kind == "constant":
            share = 1.0
        elif self.kind == "linear":
            share = 1.0 - progress
        else:
            share = 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.peak * (self.floor_ratio + (1.0 - self.floor_ratio) * share)


def default_warmup(total_steps: int) -> int:
    """A tenth of the run, at most GPT2-Chinese's 2000 steps."""
    return min(total_steps // 10, 2000)


def split_by_decay(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Divide a model's trainable parameters into those that weight decay shrinks and those that it spares.

    Decayed are the weight matrices of linear layers. Spared are biases and the scales of norms, whose size
    means something, and embeddings of tokens and positions (with the output matrix, if it is the same
    tensor): a rare character's row gets no gradient most of the time, and decay would wear it away meanwhile.

    Returns:
        (decayed, spared), each parameter once, in the order of ``model.parameters()``.
    """
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    matrices -= {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trainable if id(parameter) in matrices]
    spared = [parameter for parameter in trainable if id(parameter) not in matrices]
    return decayed, spared


def build_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only, fused into one kernel where the device has it.

    Args:
        model: Already on its device.
        learning_rate: Of the first step.
        weight_decay: Decoupled decay per step, times the learning rate.
    """
    decayed, spared = split_by_decay(model)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in [*decayed, *spared])
    return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, eps=EPSILON, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give all of an optimizer's groups a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
