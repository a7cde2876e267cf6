"""The optimizers and their learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from reformer_lm.training.muon import Float32Muon

OPTIMIZERS = ("adamw", "muon", "adafactor", "sgd")
SCHEDULES = ("cosine", "linear", "constant", "wsd")
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
        kind: ``cosine``, ``linear``, ``constant`` (no decay), or ``wsd``: warm-up, a stable peak, and a linear decay
            at the end alone (Hu et al. 2024, MiniCPM, section 4), so that a run can be made longer without a new plan.
        floor_ratio: The last step's rate as a share of the peak.
        decay_share: Of ``wsd``: the part of all steps, from 0 to 1, that the decay takes.
    """

    peak: float
    total_steps: int
    warmup_steps: int
    kind: str = "cosine"
    floor_ratio: float = 0.1
    decay_share: float = 0.2

    def rate(self, step: int) -> float:
        """Learning rate of one optimizer step.

        Args:
            step: Counted from 0.
        """
        if step < self.warmup_steps:
            # Never 0: a first step that learns nothing would be wasted.
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        begin = self.warmup_steps
        if self.kind == "wsd":
            begin = max(begin, self.total_steps - 1 - round(self.decay_share * self.total_steps))
        decay_steps = self.total_steps - 1 - begin
        progress = min(max(step - begin, 0) / decay_steps, 1.0) if decay_steps > 0 else 0.0
        if self.kind == "constant":
            share = 1.0
        elif self.kind in ("linear", "wsd"):
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
    # Conv1D is GPT-2's linear layer.
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | Conv1D)}
    matrices -= {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trainable if id(parameter) in matrices]
    spared = [parameter for parameter in trainable if id(parameter) not in matrices]
    return decayed, spared


def split_for_muon(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Divide the parameters that decay into those that muon moves and those that it leaves to AdamW.

    The output layer is a matrix too, but its rows are looked up, as an embedding's are.
    """
    decayed, _ = split_by_decay(model)
    output = getattr(getattr(model, "lm_head", None), "weight", None)
    return [p for p in decayed if p is not output], [p for p in decayed if p is output]


def state_bytes(model: nn.Module, kind: str) -> int:
    """Memory that an optimizer's state takes.

    Args:
        model: Of which only shapes matter; it may be on the meta device.
        kind: One of `OPTIMIZERS`.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sizes = {id(parameter): parameter.numel() * parameter.element_size() for parameter in trained}
    if kind == "adafactor":
        # A row and a column for each matrix; as much as the parameter itself for the others.
        return sum(
            sizes[id(p)] if p.dim() < 2 else p.element_size() * (p.numel() // p.shape[-1] + p.numel() // p.shape[-2])
            for p in trained
        )
    once = {id(parameter) for parameter in split_for_muon(model)[0]} if kind == "muon" else set()
    if kind == "sgd":
        once = set(sizes)
    return sum(size if key in once else 2 * size for key, size in sizes.items())


def build_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float, kind: str = "adamw"
) -> torch.optim.Optimizer:
    """One of torch's optimizers, with weight decay on matrices only.

    All take AdamW's learning rates but for ``sgd``. ``muon`` moves the weight matrices inside the layers along their
    orthogonalised momentum (Jordan et al. 2024), scaled to the size that AdamW's updates have (Liu et al. 2025,
    section 2.2), and leaves all other parameters to AdamW.

    Args:
        model: Already on its device; only parameters that require gradients are trained.
        learning_rate: Of the first step.
        weight_decay: Decoupled decay per step, times the learning rate.
        kind: One of `OPTIMIZERS`.
    """
    decayed, spared = split_by_decay(model)
    if kind == "muon":
        matrices, others = split_for_muon(model)
        on_cpu = any(parameter.device.type == "cpu" for parameter in matrices)
        kind_of_muon = Float32Muon if on_cpu else torch.optim.Muon
        muon = kind_of_muon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        adamw = _adamw(_groups(others, spared, weight_decay), learning_rate)
        return OptimizerChain([muon, adamw]) if matrices else adamw
    groups = _groups(decayed, spared, weight_decay)
    makers: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adamw": _adamw,
        "adafactor": lambda groups, lr: torch.optim.Adafactor(groups, lr=lr),
        # Decoupled decay is AdamW's; of SGD's own, which goes through the momentum, the learning rate is part, too.
        "sgd": lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True),
    }
    return makers[kind](groups, learning_rate)


def _groups(decayed: list[nn.Parameter], spared: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]


def _adamw(groups: list[dict[str, Any]], learning_rate: float) -> torch.optim.AdamW:
    """In one kernel where the device has it."""
    fused = all(parameter.device.type in ("cpu", "cuda") for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, eps=EPSILON, fused=fused)


class OptimizerChain(torch.optim.Optimizer):
    """Several optimizers of different parameters that act as one.

    Args:
        members: No parameter may be in two of them.
    """

    def __init__(self, members: Sequence[torch.optim.Optimizer]) -> None:
        # The same dictionaries as the members': who sets a learning rate here sets theirs.
        super().__init__([group for member in members for group in member.param_groups], {})
        self.members = list(members)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """A step of each member."""
        loss = None if closure is None else closure()
        for member in self.members:
            member.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Numbered through over all members, as if they were one."""
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        for member in self.members:
            saved, first = member.state_dict(), sum(len(group["params"]) for group in groups)
            state |= {first + number: entry for number, entry in saved["state"].items()}
            groups += [{**group, "params": [first + n for n in group["params"]]} for group in saved["param_groups"]]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give each member its part.

        Raises:
            ValueError: If the groups are not of the members' number or sizes.
        """
        groups = list(state_dict["param_groups"])
        if len(groups) != len(self.param_groups):
            raise ValueError(f"{len(groups)} parameter groups for {len(self.param_groups)}")
        for member in self.members:
            own, groups = groups[: len(member.param_groups)], groups[len(member.param_groups) :]
            numbers = [number for group in own for number in group["params"]]
            first = min(numbers, default=0)
            member.load_state_dict(
                {
                    "state": {n - first: state_dict["state"][n] for n in numbers if n in state_dict["state"]},
                    "param_groups": [{**group, "params": [n - first for n in group["params"]]} for group in own],
                }
            )
        # Loading made new dictionaries.
        self.param_groups = [group for member in self.members for group in member.param_groups]


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give all of an optimizer's groups a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
