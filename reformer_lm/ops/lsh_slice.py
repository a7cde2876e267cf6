"""The attention of some (batch, head) rows over all rounds, forward and backward.

Softmaxes are taken in base 2 (logits times log2 e): torch's exp2 is vectorised for every argument, while its exp goes
through a library that is up to thirty times slower on the -inf of masked logits. With that, matrix products and exp2
beat torch's fused CPU kernel on blocks of this size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from reformer_lm.ops.keys import KeyNorm, normalize_keys
from reformer_lm.ops.lsh_blocks import NO_MATCH, SortedRound

# Logits of one group of blocks: on a CPU few enough to stay in the cache, on an accelerator enough to fill it.
_LOGIT_ELEMENTS = {"cpu": 1 << 19}
_LOGIT_ELEMENTS_ELSEWHERE = 1 << 26

# The logsumexp of a round without a match: finite, so that no NaN arises, and without weight in the merge.
NO_WEIGHT = -1e30

_LOG2_E = math.log2(math.e)


class Settings(NamedTuple):
    """What does not differ between slices; see `lsh_attention_torch`."""

    window: int
    key_norm: KeyNorm
    dropout_p: float
    seed: int
    allow_duplicates: bool


class Memory(NamedTuple):
    """What every token of a row sees besides its matches.

    Attributes:
        keys: [n, M, D], normalised.
        values: [n, M, D_v].
        mask: bool [n, M], False for what a row does not see; or None.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None


class Slice:
    """Some (batch, head) rows, worked through together.

    Attributes:
        rows: which of all rows.
        q: [n, T, D].
        values: [n, T, D_v].
    """

    def __init__(
        self,
        rows: slice,
        index: int,
        q: Tensor,
        values: Tensor,
        order: Tensor,
        start: Tensor,
        inverse: Tensor | None,
        memory: Memory | None,
        settings: Settings,
    ) -> None:
        self.rows, self.index, self.q, self.values = rows, index, q, values
        self.order, self.start, self.inverse, self.memory, self.settings = order, start, inverse, memory, settings
        self.keys = normalize_keys(q, settings.key_norm)
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.scale = 1.0 / math.sqrt(q.shape[-1])
        self.logit_elements = _LOGIT_ELEMENTS.get(q.device.type, _LOGIT_ELEMENTS_ELSEWHERE)
        if q.element_size() < 4:
            # Products of half precision are so short that larger groups pay.
            self.logit_elements *= 2

    def forward(self) -> tuple[Tensor, Tensor]:
        """The merged output [n, T, D_v] and its logsumexp [n, T] in base 2, both float32 or wider."""
        n, tokens, _ = self.q.shape
        merged: Tensor | None = None
        total: Tensor | None = None
        # Side by side, so that one copy moves all three to their place.
        packed = torch.cat((self.q, self.keys, self.values), dim=-1).flatten(0, 1)
        for r, sorted_round in self._rounds():
            o, lse = self._round_forward(sorted_round, packed, self._generator(r))
            assert self.inverse is not None
            back = sorted_round.back(self.inverse[:, r])
            o, lse = o.index_select(0, back).view(n, tokens, -1), lse.index_select(0, back).view(n, tokens)
            if merged is None or total is None:
                merged, total = o, lse
            else:
                merged, total = _merge(merged, total, o, lse)
        assert merged is not None and total is not None
        if self.memory is not None:
            merged, total = _merge(merged, total, *self._memory_forward())
        return merged, total

    def _rounds(self) -> Iterator[tuple[int, SortedRound]]:
        earlier: list[SortedRound] = []
        for r in range(self.order.shape[1]):
            sorted_round = SortedRound(
                self.order[:, r].long(), self.start[:, r].long(), self.settings.window, earlier=tuple(earlier)
            )
            if not self.settings.allow_duplicates:
                earlier.append(sorted_round)
            yield r, sorted_round

    def _generator(self, round_index: int) -> torch.Generator | None:
        if not self.settings.dropout_p:
            return None
        seed = self.settings.seed + 1_000_003 * self.index + round_index
        return torch.Generator(self.q.device).manual_seed(seed)

    def _keep(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """Dropout factors: 0, or 1 / (1 - p)."""
        keep = 1.0 - self.settings.dropout_p
        return torch.empty_like(like).bernoulli_(keep, generator=generator).div_(keep)

    def _logits(self, q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
        """Logits in base 2, float32 or wider."""
        transposed = k.transpose(-1, -2)
        factor = self.scale * _LOG2_E
        if bias is None:
            return torch.bmm(q, transposed).to(self.wide) * factor
        return torch.baddbmm(bias, q, transposed, alpha=factor).to(self.wide)

    def _softmax_forward(self, logits: Tensor, v: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Output and logsumexp (base 2) of logits [c, Q, K], which are overwritten."""
        highest = logits.amax(dim=-1, keepdim=True)
        weights = logits.sub_(highest).exp2_()
        norm = weights.sum(dim=-1, keepdim=True)
        if generator is not None:
            weights = weights * self._keep(weights, generator)
        out = torch.bmm(weights.to(v.dtype), v).to(self.wide).div_(norm)
        return out, norm.log2_().add_(highest).squeeze(-1)

    def _softmax_backward(
        self,
        logits: Tensor,
        v: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        delta: Tensor,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the logits (base e) and of v, in v's dtype, from the merged lse and delta [c, Q].

        The factor between logits and products of queries and keys is left to the caller.
        """
        weights = logits.sub_(lse.unsqueeze(-1)).exp2_()
        grad_weights = torch.bmm(grad_out, v.transpose(-1, -2)).to(self.wide)
        kept = weights
        if generator is not None:
            factors = self._keep(weights, generator)
            kept, grad_weights = weights * factors, grad_weights * factors
        grad_v = torch.bmm(kept.to(v.dtype).transpose(-1, -2), grad_out)
        grad_logits = grad_weights.sub_(delta.unsqueeze(-1)).mul_(weights).to(v.dtype)
        return grad_logits, grad_v

    def _round_forward(
        self, sorted_round: SortedRound, packed: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Output [n * L, D_v] and logsumexp [n * L] in sorted order (L: T filled up to whole blocks)."""
        dim = self.q.shape[-1]
        out = torch.empty(sorted_round.places, self.values.shape[-1], dtype=self.wide, device=packed.device)
        lse = torch.empty(sorted_round.places, dtype=self.wide, device=packed.device)
        for group in sorted_round.groups(self.logit_elements):
            gathered = group.gather(packed)
            queries = group.queries(gathered[:, :dim])
            # Copied, since matrix products on overlapping views are slow.
            keys = group.keys(gathered[:, dim : 2 * dim]).contiguous()
            values = group.keys(gathered[:, 2 * dim :]).contiguous()
            logits = self._logits(queries, keys, group.bias(queries.dtype))
            o, o_lse = self._softmax_forward(logits, values, generator)
            out[group.places], lse[group.places] = o.flatten(0, 1), o_lse.flatten()
        return out, lse.masked_fill_(lse < NO_MATCH, NO_WEIGHT)

    def backward(
        self, grad_out: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Gradients of q, keys, values [n, T, .] and of the memory's keys and values [n, M, .].

        Args:
            grad_out: [n, T, D_v], gradient of the merged output.
            out: [n, T, D_v], the merged output.
            lse: [n, T], the merged logsumexp in base 2.
        """
        dim = self.q.shape[-1]
        delta = (grad_out.to(self.wide) * out.to(self.wide)).sum(dim=-1)
        packed = torch.cat((self.q, self.keys, self.values, grad_out), dim=-1).flatten(0, 1)
        # Queries, keys and values side by side.
        total = torch.zeros(packed.shape[0], 2 * dim + self.values.shape[-1], dtype=self.wide, device=packed.device)
        for r, sorted_round in self._rounds():
            self._round_backward(sorted_round, packed, lse.flatten(), delta.flatten(), self._generator(r), total)
        total = total.view(*self.q.shape[:2], -1)
        of_memory = None
        if self.memory is not None:
            of_memory = self._memory_backward(total[..., :dim], grad_out, delta, lse)
        # The scale of the logits, once for all rounds.
        total[..., : 2 * dim] *= self.scale
        return total[..., :dim], total[..., dim : 2 * dim], total[..., 2 * dim :], of_memory

    def _round_backward(
        self,
        sorted_round: SortedRound,
        packed: Tensor,
        lse: Tensor,
        delta: Tensor,
        generator: torch.Generator | None,
        total: Tensor,
    ) -> None:
        """Adds the gradients of one round to ``total`` [n * T, 2 * D + D_v]."""
        dim, to_values = self.q.shape[-1], 2 * self.q.shape[-1] + self.values.shape[-1]
        for group in sorted_round.groups(self.logit_elements):
            gathered = group.gather(packed)
            queries = group.queries(gathered[:, :dim]).contiguous()
            keys = group.keys(gathered[:, dim : 2 * dim]).contiguous()
            values = group.keys(gathered[:, 2 * dim : to_values]).contiguous()
            grad_out = group.queries(gathered[:, to_values:]).contiguous()
            logits = self._logits(queries, keys, group.bias(queries.dtype))
            grad_logits, grad_values = self._softmax_backward(
                logits, values, group.of_queries(lse), grad_out, group.of_queries(delta), generator
            )
            grads = torch.empty(gathered.shape[0], to_values, dtype=self.wide, device=packed.device)
            grads[: group.window, :dim] = 0.0
            group.queries(grads[:, :dim]).copy_(torch.bmm(grad_logits, keys))
            group.set_keys(grads[:, dim : 2 * dim], torch.bmm(grad_logits.transpose(-1, -2), queries))
            group.set_keys(grads[:, 2 * dim :], grad_values)
            # A token stands once among the places of a group; what fills up rows has gradients of 0.
            total.index_add_(0, group.index, grads)

    def _memory_forward(self) -> tuple[Tensor, Tensor]:
        """Attention of every token over the memory: output [n, T, D_v] and logsumexp [n, T]."""
        assert self.memory is not None
        generator = self._generator(self.order.shape[1])
        parts = [
            self._softmax_forward(self._memory_logits(self.q[:, tokens]), self.memory.values, generator)
            for tokens in self._memory_groups()
        ]
        return torch.cat([o for o, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=1)

    def _memory_logits(self, q: Tensor) -> Tensor:
        assert self.memory is not None
        logits = self._logits(q, self.memory.keys, None)
        if self.memory.mask is not None:
            # A row that sees no memory has a logsumexp that weighs nothing beside any match.
            logits.masked_fill_(~self.memory.mask.unsqueeze(1), NO_WEIGHT)
        return logits

    def _memory_backward(self, grad_q: Tensor, grad_out: Tensor, delta: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the memory's keys and values; that of the queries is added to ``grad_q``."""
        assert self.memory is not None
        keys, values = self.memory.keys, self.memory.values
        generator = self._generator(self.order.shape[1])
        grad_keys, grad_values = (torch.zeros_like(m, dtype=self.wide) for m in (keys, values))
        for tokens in self._memory_groups():
            q = self.q[:, tokens]
            logits = self._memory_logits(q)
            grad_logits, through_values = self._softmax_backward(
                logits, values, lse[:, tokens], grad_out[:, tokens], delta[:, tokens], generator
            )
            grad_q[:, tokens] += torch.bmm(grad_logits, keys)
            grad_keys += torch.bmm(grad_logits.transpose(-1, -2), q)
            grad_values += through_values
        return grad_keys.mul_(self.scale), grad_values

    def _memory_groups(self) -> Iterator[slice]:
        assert self.memory is not None
        n, tokens, _ = self.q.shape
        step = max(1, self.logit_elements // (n * self.memory.keys.shape[1]))
        for begin in range(0, tokens, step):
            yield slice(begin, begin + step)


def _merge(merged: Tensor, total: Tensor, o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """One softmax over the union of two sets of keys, from their outputs and logsumexps; overwrites its arguments."""
    union = torch.maximum(total, lse)
    weight, other = (total - union).exp2_(), (lse - union).exp2_()
    norm = weight + other
    merged.mul_((weight / norm).unsqueeze(-1)).addcmul_(o, (other / norm).unsqueeze(-1))
    return merged, union.add_(norm.log2_())
