"""The reversible stack: its backward pass rebuilds each layer's input instead of keeping it.

    y1 = x1 + attention(x2)        x2 = y2 - feed_forward(y1)
    y2 = x2 + feed_forward(y1)     x1 = y1 - attention(x2)

Only the last pair is kept. What a rebuild needs besides it is saved as explicit values per layer: the buckets (a hash
taken anew could fall differently) and the state of the random generators where dropout is on. The autograd Function
takes the parameters as explicit inputs, so that hooks on them (DistributedDataParallel's) fire once, in order.

Source: Gomez et al. 2017 (arXiv 1707.04585), section 3; Kitaev et al. 2020, section 3.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from reformer_lm.config import ReformerLMConfig
from reformer_lm.layers.attention import LSHSelfAttention, SequenceInfo
from reformer_lm.layers.feed_forward import FeedForward
from reformer_lm.layers.norms import make_gate, make_norm


class ReversibleLayer(nn.Module):
    """One attention block and one feed-forward block, each with its norm."""

    def __init__(self, config: ReformerLMConfig, layer_index: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = LSHSelfAttention(config, layer_index)
        self.attention_gate = make_gate(config)
        self.feed_forward_norm = make_norm(config)
        self.feed_forward = FeedForward(config)
        self.feed_forward_gate = make_gate(config)

    def attention_branch(
        self, x: Tensor, info: SequenceInfo, buckets: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What the attention block adds to the first stream, [B, T, hidden_size], and the buckets it used."""
        # The streams are float32 also where the parameters are bf16.
        x = self.attention_norm(x.to(self.attention.query_key.weight.dtype))
        out, buckets = self.attention(x, info, buckets)
        return self.attention_gate(out), buckets

    def feed_forward_branch(self, x: Tensor) -> Tensor:
        """What the feed-forward block adds to the second stream, [B, T, hidden_size]."""
        x = self.feed_forward_norm(x.to(self.feed_forward.inner.weight.dtype))
        return self.feed_forward_gate(self.feed_forward(x))


class ReversibleStack(nn.Module):
    """The layers, run reversibly or, for short sequences, with plain autograd."""

    def __init__(self, config: ReformerLMConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ReversibleLayer(config, index) for index in range(config.num_hidden_layers))
        self.layer_dropout = config.layer_dropout
        self.reversible_threshold = config.reversible_threshold
        self.draws_random_numbers = any(
            (config.hidden_dropout_prob, config.activation_dropout, config.attention_dropout)
        )

    def forward(self, x1: Tensor, x2: Tensor, info: SequenceInfo) -> tuple[Tensor, Tensor]:
        """Runs all layers.

        Args:
            x1: first residual stream [B, T, hidden_size].
            x2: second residual stream [B, T, hidden_size].
            info: positions, mask and step, the same for every layer.

        Returns:
            Both streams behind the last layer.
        """
        layers = self._layers_of_this_step()
        if x1.shape[1] <= self.reversible_threshold or not torch.is_grad_enabled():
            # Of all the layers' outputs only the last one is kept.
            (last,) = deque(self._plain(layers, x1, x2, info), maxlen=1)
            return last
        random = self.training and self.draws_random_numbers
        parameters = [p for layer in layers for p in layer.parameters() if p.requires_grad]
        return _Reversible.apply(x1, x2, info.context, layers, info, random, *dict.fromkeys(parameters))

    def hidden_states(self, x1: Tensor, x2: Tensor, info: SequenceInfo) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields both streams behind each layer; keeps activations, whatever the threshold."""
        return self._plain(self._layers_of_this_step(), x1, x2, info)

    def _plain(
        self, layers: list[ReversibleLayer], x1: Tensor, x2: Tensor, info: SequenceInfo
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for layer in layers:
            x1 = x1 + layer.attention_branch(x2, info)[0]
            x2 = x2 + layer.feed_forward_branch(x1)
            yield x1, x2

    def _layers_of_this_step(self) -> list[ReversibleLayer]:
        layers: list[ReversibleLayer] = list(self.layers)  # type: ignore[arg-type]  # ModuleList is untyped
        if not (self.training and self.layer_dropout):
            return layers
        kept = torch.rand(len(layers)) >= self.layer_dropout
        return [layer for layer, keep in zip(layers, kept.tolist(), strict=True) if keep] or layers[:1]


@dataclass
class _Replay:
    """What rebuilding one layer needs besides its output."""

    buckets: Tensor | None
    attention_state: _RandomState | None
    feed_forward_state: _RandomState | None


class _RandomState:
    """The state of the generators that dropout on a device draws from."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Also on an accelerator: attention dropout takes its seed from the CPU's generator.
        self.cpu = torch.get_rng_state()
        self.accelerator = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        devices = [self.device] if self.accelerator is not None else []
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(self.cpu)
            if self.accelerator is not None:
                torch.cuda.set_rng_state(self.accelerator, self.device)
            yield


class _AutocastState:
    """Autocast as it was in the forward pass; the backward pass runs outside of the caller's context."""

    def __init__(self, device: torch.device) -> None:
        self.device_type = device.type
        self.enabled = torch.is_autocast_enabled(device.type)
        self.dtype = torch.get_autocast_dtype(device.type)

    def context(self) -> torch.autocast:
        # Without the cache: it would hand weights cast under no_grad, cut from their graph, to the backward pass
        # of someone who calls backward() inside the autocast context.
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x1: Tensor,
        x2: Tensor,
        context: Tensor | None,
        layers: list[ReversibleLayer],
        info: SequenceInfo,
        random: bool,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        device = x1.device
        ctx.autocast = _AutocastState(device)
        replays = []
        with ctx.autocast.context():
            for layer in layers:
                state = _RandomState(device) if random else None
                out, buckets = layer.attention_branch(x2, info)
                x1 = x1 + out
                replay = _Replay(buckets, state, _RandomState(device) if random else None)
                x2 = x2 + layer.feed_forward_branch(x1)
                replays.append(replay)
        # The context is an input with a gradient, so it is kept as a saved tensor and not inside of info.
        ctx.layers, ctx.info, ctx.replays, ctx.parameters = layers, replace(info, context=None), replays, parameters
        ctx.save_for_backward(x1, x2, context)
        return x1, x2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad1: Tensor, grad2: Tensor) -> tuple[Tensor | None, ...]:
        y1, y2, context = ctx.saved_tensors
        gradients: dict[Tensor, Tensor] = {}
        info = ctx.info
        inputs: list[Tensor] = []
        if context is not None:
            context = context.detach().requires_grad_(ctx.needs_input_grad[2])
            info = replace(info, context=context)
            inputs = [context] if context.requires_grad else []
        for layer, replay in zip(reversed(ctx.layers), reversed(ctx.replays), strict=True):
            needed = [p for name in _FEED_FORWARD for p in getattr(layer, name).parameters() if p.requires_grad]
            branch = layer.feed_forward_branch
            out, through = _rebuild(ctx, branch, y1, grad2, replay.feed_forward_state, needed, gradients)
            y2 = y2 - out
            grad1 = grad1 + through

            def attend(x: Tensor, layer: ReversibleLayer = layer, buckets: Tensor | None = replay.buckets) -> Tensor:
                return layer.attention_branch(x, info, buckets)[0]

            needed = [p for name in _ATTENTION for p in getattr(layer, name).parameters() if p.requires_grad]
            out, through = _rebuild(ctx, attend, y2, grad1, replay.attention_state, needed + inputs, gradients)
            y1 = y1 - out
            grad2 = grad2 + through
        needs1, needs2 = ctx.needs_input_grad[:2]
        of_context = None if context is None else gradients.get(context)
        of_parameters = (gradients.get(parameter) for parameter in ctx.parameters)
        return grad1 if needs1 else None, grad2 if needs2 else None, of_context, None, None, None, *of_parameters


_ATTENTION = ("attention_norm", "attention", "attention_gate")
_FEED_FORWARD = ("feed_forward_norm", "feed_forward", "feed_forward_gate")


def _rebuild(
    ctx: Any,
    branch: Any,
    x: Tensor,
    grad_out: Tensor,
    state: _RandomState | None,
    needed: list[Tensor],
    gradients: dict[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Runs one block again, with a graph, and sends the gradient through it.

    Returns:
        The block's output, without graph, and the gradient of its input. The gradients of ``needed`` (parameters, the
        context) are added to ``gradients``.
    """
    with torch.enable_grad(), ctx.autocast.context(), state.replayed() if state else contextlib.nullcontext():
        leaf = x.detach().requires_grad_()
        out = branch(leaf)
    found = torch.autograd.grad(out, [leaf, *needed], grad_out.to(out.dtype), allow_unused=True)
    for wanted, gradient in zip(needed, found[1:], strict=True):
        if gradient is not None:
            previous = gradients.get(wanted)
            gradients[wanted] = gradient if previous is None else previous + gradient
    through = found[0]
    assert through is not None
    return out.detach(), through
