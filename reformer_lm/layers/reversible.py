"""The reversible stack: its backward pass rebuilds each layer's input instead of keeping it.

    y1 = x1 + attention(x2)        x2 = y2 - feed_forward(y1)
    y2 = x2 + feed_forward(y1)     x1 = y1 - attention(x2)

Only the last pair is kept. What a rebuild needs besides it is saved as explicit values per layer: the buckets (a hash
taken anew could fall differently) and the state of the random generators where dropout is on.

Each layer is a module call with an autograd Function of its own, which takes the layer's parameters as explicit inputs:
hooks on modules and parameters (FSDP2's, DistributedDataParallel's) fire as for any other layer, and gradients of late
layers are ready while early ones are still at work. The Functions hand the rebuilt streams on to each other through a
`_Chain`.

Source: Gomez et al. 2017 (arXiv 1707.04585), section 3; Kitaev et al. 2020, section 3.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from reformer_lm.config import ReformerLMConfig
from reformer_lm.layers.attention import LSHSelfAttention
from reformer_lm.layers.feed_forward import FeedForward, TokenBlock
from reformer_lm.layers.heads import AttentionReplay
from reformer_lm.layers.lending import Borrower
from reformer_lm.layers.norms import make_gate, make_norm
from reformer_lm.layers.product_key_memory import ProductKeyMemory
from reformer_lm.layers.sequence import SequenceInfo


class ReversibleLayer(Borrower):
    """One attention block and one feed-forward block, each with its norm.

    Args:
        config: of the model.
        layer_index: which layer this is.
        lender: the layer whose attention and feed-forward weights this one uses; None for weights of its own.
    """

    lent = ("feed_forward",)
    attention: LSHSelfAttention
    feed_forward: TokenBlock

    def __init__(self, config: ReformerLMConfig, layer_index: int, lender: ReversibleLayer | None = None) -> None:
        super().__init__(lender)
        self.attention_norm = make_norm(config)
        self.attention = LSHSelfAttention(config, layer_index, None if lender is None else lender.attention)
        self.attention_gate = make_gate(config)
        self.feed_forward_norm = make_norm(config)
        if lender is None:
            block = ProductKeyMemory if layer_index in config.product_key_layers else FeedForward
            self.feed_forward = block(config)
        self.feed_forward_gate = make_gate(config)

    def weights(self, blocks: tuple[str, ...]) -> list[nn.Parameter]:
        """The trainable parameters that some of its blocks compute with, whoever owns them."""
        modules = (getattr(self, name) for name in blocks)
        found = (m.weights() if isinstance(m, LSHSelfAttention) else m.parameters() for m in modules)
        return [parameter for parameters in found for parameter in parameters if parameter.requires_grad]

    def forward(self, x1: Tensor, x2: Tensor, info: SequenceInfo, chain: _Chain | None = None) -> tuple[Tensor, Tensor]:
        """Runs the layer on both streams [B, T, hidden_size].

        Args:
            x1: first stream.
            x2: second stream.
            info: positions, masks and step.
            chain: the reversible chain that this layer is a link of, or None for plain autograd.
        """
        if chain is None:
            x1 = x1 + self.attention_branch(x2, info)[0]
            return x1, x2 + self.feed_forward_branch(x1)
        parameters = self.weights(_ATTENTION + _FEED_FORWARD)
        return _Reversible.apply(x1, x2, info.context, self, info, chain, *parameters)

    def attention_branch(
        self, x: Tensor, info: SequenceInfo, replays: Sequence[AttentionReplay] | None = None, keep: bool = False
    ) -> tuple[Tensor, Sequence[AttentionReplay]]:
        """What the attention block adds to the first stream, [B, T, hidden_size], and how to repeat it."""
        # The streams are float32 also where the parameters are bf16.
        x = self.attention_norm(x.to(self.attention.query_key.weight.dtype))
        out, replays = self.attention(x, info, replays, keep)
        return self.attention_gate(out), replays

    def feed_forward_branch(self, x: Tensor) -> Tensor:
        """What the feed-forward block adds to the second stream, [B, T, hidden_size]."""
        x = self.feed_forward_norm(x.to(self.feed_forward.weight_dtype))
        return self.feed_forward_gate(self.feed_forward(x))


class ReversibleStack(nn.Module):
    """The layers, run reversibly or, for short sequences or on request, with plain autograd."""

    def __init__(self, config: ReformerLMConfig) -> None:
        super().__init__()
        first = ReversibleLayer(config, 0)
        lender = first if config.share_layer_weights else None
        others = (ReversibleLayer(config, index, lender) for index in range(1, config.num_hidden_layers))
        self.layers = nn.ModuleList((first, *others))
        self.layer_dropout = config.layer_dropout
        self.reversible = config.reversible
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
        plain = self.reversible == "off" or x1.shape[1] <= self.reversible_threshold or not torch.is_grad_enabled()
        plain = plain or info.cache is not None
        chain = None
        if not plain:
            random = self.training and self.draws_random_numbers
            chain = _Chain(len(layers), random, keep_attention=self.reversible == "keep_attention")
        for layer in layers:
            x1, x2 = layer(x1, x2, info, chain)
        return x1, x2

    def hidden_states(self, x1: Tensor, x2: Tensor, info: SequenceInfo) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields both streams behind each layer; keeps activations, whatever the threshold."""
        for layer in self._layers_of_this_step():
            x1, x2 = layer(x1, x2, info)
            yield x1, x2

    def _layers_of_this_step(self) -> list[ReversibleLayer]:
        layers: list[ReversibleLayer] = list(self.layers)  # type: ignore[arg-type]  # ModuleList is untyped
        if not (self.training and self.layer_dropout):
            return layers
        kept = torch.rand(len(layers)) >= self.layer_dropout
        return [layer for layer, keep in zip(layers, kept.tolist(), strict=True) if keep] or layers[:1]


class _Chain:
    """What the layers of one forward pass hand on to each other in its backward pass."""

    def __init__(self, layers: int, random: bool, keep_attention: bool) -> None:
        self.layers_to_come = layers
        self.random = random
        self.keep_attention = keep_attention
        self.streams: tuple[Tensor, Tensor] | None = None

    def next_is_last(self) -> bool:
        """Counts the layers as they are run; true at the last one, whose output is the one to keep."""
        self.layers_to_come -= 1
        return self.layers_to_come == 0

    def take(self) -> tuple[Tensor, Tensor]:
        """The streams behind a layer, from the backward pass of the layer after it."""
        assert self.streams is not None
        streams, self.streams = self.streams, None
        return streams


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
    """One layer of a chain."""

    @staticmethod
    def forward(
        ctx: Any,
        x1: Tensor,
        x2: Tensor,
        context: Tensor | None,
        layer: ReversibleLayer,
        info: SequenceInfo,
        chain: _Chain,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        device = x1.device
        ctx.autocast = _AutocastState(device)
        with ctx.autocast.context():
            ctx.attention_state = _RandomState(device) if chain.random else None
            out, ctx.replays = layer.attention_branch(x2, info, keep=chain.keep_attention)
            x1 = x1 + out
            ctx.feed_forward_state = _RandomState(device) if chain.random else None
            x2 = x2 + layer.feed_forward_branch(x1)
        # The context is an input with a gradient, so it is kept as a saved tensor and not inside of info.
        ctx.layer, ctx.info, ctx.chain, ctx.parameters = layer, replace(info, context=None), chain, parameters
        streams = (x1, x2) if chain.next_is_last() else (None, None)
        ctx.save_for_backward(*streams, context)
        return x1, x2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad1: Tensor, grad2: Tensor) -> tuple[Tensor | None, ...]:
        y1, y2, context = ctx.saved_tensors
        # Streams and gradients that come from the layer after this one are nobody else's: they are overwritten.
        owned = y1 is None
        if owned:
            y1, y2 = ctx.chain.take()
        layer, info = ctx.layer, ctx.info
        gradients: dict[Tensor, Tensor] = {}
        inputs: list[Tensor] = []
        if context is not None:
            context = context.detach().requires_grad_(ctx.needs_input_grad[2])
            info = replace(info, context=context)
            inputs = [context] if context.requires_grad else []

        def attend(x: Tensor) -> Tensor:
            return layer.attention_branch(x, info, ctx.replays)[0]

        needed: list[Tensor] = layer.weights(_FEED_FORWARD)
        pieces = layer.feed_forward.pieces(y1.shape[1])
        x2, grad1 = _undo(
            ctx,
            layer.feed_forward_branch,
            y1,
            y2,
            grad1,
            grad2,
            pieces,
            ctx.feed_forward_state,
            needed,
            gradients,
            owned,
        )
        del y2
        needed = layer.weights(_ATTENTION)
        whole = [slice(None)]
        x1, grad2 = _undo(
            ctx, attend, x2, y1, grad2, grad1, whole, ctx.attention_state, needed + inputs, gradients, owned
        )
        ctx.chain.streams = (x1, x2)
        needs1, needs2 = ctx.needs_input_grad[:2]
        of_context = None if context is None else gradients.get(context)
        of_parameters = (gradients.get(parameter) for parameter in ctx.parameters)
        return grad1 if needs1 else None, grad2 if needs2 else None, of_context, None, None, None, *of_parameters


_ATTENTION = ("attention_norm", "attention", "attention_gate")
_FEED_FORWARD = ("feed_forward_norm", "feed_forward", "feed_forward_gate")


def _undo(
    ctx: Any,
    branch: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    grad_x: Tensor,
    grad_y: Tensor,
    pieces: list[slice],
    state: _RandomState | None,
    needed: list[Tensor],
    gradients: dict[Tensor, Tensor],
    in_place: bool,
) -> tuple[Tensor, Tensor]:
    """Takes y = before + branch(x) back: runs the branch again, with a graph, and sends the gradient through it.

    Args:
        ctx: of the Function.
        branch: a block of the layer, with its norm and gate.
        x: what it read, [B, T, hidden_size].
        y: the other stream, with what it wrote.
        grad_x: gradient of x without what comes through the branch.
        grad_y: gradient of y.
        pieces: of the T tokens, which the branch takes one after the other.
        state: of the random generators before the branch ran.
        needed: parameters (and the context) whose gradients are added to ``gradients``.
        gradients: by parameter.
        in_place: whether ``y`` and ``grad_x`` may be overwritten with what is returned.

    Returns:
        ``before``, and the whole gradient of x.
    """
    before, total = (y, grad_x) if in_place else (torch.empty_like(y), torch.empty_like(grad_x))
    with state.replayed() if state else contextlib.nullcontext():
        for tokens in pieces:
            with torch.enable_grad(), ctx.autocast.context():
                leaf = x[:, tokens].detach().requires_grad_()
                out = branch(leaf)
            torch.sub(y[:, tokens], out.detach(), out=before[:, tokens])
            found = torch.autograd.grad(out, [leaf, *needed], grad_y[:, tokens].to(out.dtype), allow_unused=True)
            del out
            assert found[0] is not None
            torch.add(grad_x[:, tokens], found[0], out=total[:, tokens])
            for wanted, gradient in zip(needed, found[1:], strict=True):
                if gradient is not None:
                    previous = gradients.get(wanted)
                    gradients[wanted] = gradient if previous is None else previous.add_(gradient)
    return before, total
