"""Muon for processors without bfloat16: torch's, orthogonalising in float32."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


class Float32Muon(torch.optim.Muon):
    """`torch.optim.Muon` whose matrix products are in the parameters' own precision.

    torch's are in bfloat16 whatever the device, which a processor without bfloat16 instructions emulates some hundred
    times slower than float32. All options but ``adjust_lr_fn``, which is always "match_rms_adamw" here, are torch's.

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; Liu et al. 2025 (arXiv
    2502.16982), section 2.2, for the size of the update.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step for all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                momentum = state["momentum_buffer"]
                momentum.lerp_(gradient, 1 - group["momentum"])
                direction = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
                update = orthogonalized(direction, group["ns_coefficients"], group["ns_steps"], group["eps"])
                # Root mean square of AdamW's updates, whatever the shape.
                rate = group["lr"] * 0.2 * math.sqrt(max(parameter.shape))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-rate)
        return loss


def orthogonalized(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, epsilon: float) -> Tensor:
    """About U V^T of a matrix U S V^T, by a quintic Newton-Schulz iteration.

    Args:
        matrix: [N, M].
        coefficients: Of X, (X X^T) X and (X X^T)^2 X.
        steps: Of the iteration.
        epsilon: Least norm to divide by.

    Returns:
        [N, M] with singular values around 1.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    # The iteration needs singular values of at most 1.
    x = x / x.norm().clamp(min=epsilon)
    first, third, fifth = coefficients
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=third, alpha=fifth), x, beta=first)
    return x.mT if tall else x
