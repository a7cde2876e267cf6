"""LSH attention from the next tokens over all before them, at a cost that does not grow with their number.

What a token may see in a round is the window of the most recent earlier tokens in its bucket. So a ring of W positions
per head, round and bucket says all there is to know: a new token reads the R rings of its buckets, attends, and enters
them. Keys and values stay where they were written, by position. The sets are those of `reformer_lm.ops.lsh_attention`,
and so are the outputs, to rounding.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from reformer_lm.ops.keys import normalize_keys
from reformer_lm.ops.lsh_ring_state import MOST_AT_ONCE, NOBODY, RingState


class _Memory(NamedTuple):
    """Normalised keys [(B,) H, M, D], values [(B,) H, M, D_v] and a mask [B, M], or None."""

    keys: Tensor
    values: Tensor
    mask: Tensor | None

    def logits(self, q: Tensor, factor: float) -> Tensor:
        """Of queries [B, H, t, D]: [B, H, t, M], float32 or wider."""
        logits = (q @ self.keys.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * factor
        return logits if self.mask is None else logits.masked_fill(~self.mask[:, None, None, :], -math.inf)


class LSHRings(RingState):
    """`RingState`, and the attention of the next tokens over it."""

    @torch.no_grad()
    def attend(
        self,
        qk_BHTD: Tensor,
        v_BHTD: Tensor,
        buckets_BHRT: Tensor,
        counts_B: Tensor | None = None,
        memory: tuple[Tensor, Tensor] | None = None,
        memory_mask_BM: Tensor | None = None,
    ) -> Tensor:
        """Attention of new tokens over those before them, which they then join.

        Args:
            qk_BHTD: shared query/key vectors [B, H, T, D] of the new tokens.
            v_BHTD: their values [B, H, T, D_v].
            buckets_BHRT: their buckets [B, H, R, T].
            counts_B: see `fill`. Behind the real tokens of a row the output means nothing.
            memory: shared vectors [H, M, D] and values [H, M, D_v] that every token sees; or each with its own for
                every row of the batch.
            memory_mask_BM: optional bool [B, M], False for memory that a row does not see.

        Returns:
            [B, H, T, D_v] in the dtype of ``v_BHTD``.
        """
        tokens = qk_BHTD.shape[2]
        self._reserve(self._longest + tokens, qk_BHTD, v_BHTD)
        # The first tokens of all are few, and memory is rare.
        early = self.full_attention_threshold > (self._longest if self._even else 0)
        if tokens == 1 and counts_B is None and memory is None and not early:
            return self._attend_next(qk_BHTD, v_BHTD, buckets_BHRT)
        even = self._even and counts_B is None
        longest = self._longest + tokens
        if counts_B is None:
            counts_B = torch.full_like(self.lengths, tokens)
        step = min(self.window, MOST_AT_ONCE)
        remembered = (
            None if memory is None else _Memory(normalize_keys(memory[0], self.key_norm), memory[1], memory_mask_BM)
        )
        parts = []
        for begin in range(0, tokens, step):
            piece = slice(begin, begin + step)
            real = (counts_B - begin).clamp(0, min(step, tokens - begin))
            parts.append(
                self._attend_piece(
                    qk_BHTD[:, :, piece], v_BHTD[:, :, piece], buckets_BHRT[..., piece], real, remembered
                )
            )
        if even:
            self._longest = longest
        else:
            self._set_lengths(self.lengths)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _attend_next(self, qk: Tensor, v: Tensor, buckets: Tensor) -> Tensor:
        """What `_attend_piece` does, for one more token of every row: the step of decoding, in few operations."""
        batch, heads, _, dim = qk.shape
        assert self._keys is not None and self._values is not None
        keys = normalize_keys(qk, self.key_norm)
        ring = self._first_ring + buckets[..., 0]
        ring_of = ring.flatten()
        in_ring = self._rings.view(-1, self.window).index_select(0, ring_of)
        entered = self._counts.view(-1).index_select(0, ring_of)
        slot = (entered % self.window).unsqueeze(1).long()
        driven_out = in_ring.gather(1, slot).view_as(ring)
        entry = ring_of * self.window + slot.squeeze(1)
        if self._even:
            place = self._longest
            self._keys[:, :, place] = keys[:, :, 0]
            self._values[:, :, place] = v[:, :, 0]
            self._buckets[..., place] = buckets[..., 0]
            self._driven_out[..., place] = driven_out
            self._rings.view(-1).index_fill_(0, entry, place)
        else:
            self._keys[self._rows, :, self.lengths] = keys[:, :, 0]
            self._values[self._rows, :, self.lengths] = v[:, :, 0]
            self._buckets[self._rows, :, :, self.lengths] = buckets[..., 0].int()
            self._driven_out[self._rows, :, :, self.lengths] = driven_out
            position = self.lengths.int()[:, None, None].expand_as(ring).flatten()
            self._rings.view(-1).index_copy_(0, entry, position)
        self._counts.view(-1).index_copy_(0, ring_of, entered + 1)
        self.lengths = self.lengths + 1
        self._longest += 1
        # Rounds side by side: [B * H, R * W].
        in_ring = in_ring.view(batch * heads, -1)
        unseen = in_ring < 0
        if not self.allow_duplicates:
            unseen |= _given_before(in_ring, ~unseen, self.window)
        match = in_ring.clamp_min(0)
        near, values = (
            stored.view(-1, stored.shape[-1])
            .index_select(0, (match + first).flatten())
            .view(batch, heads, -1, stored.shape[-1])
            for stored, first in ((self._keys, self._first_key), (self._values, self._first_value))
        )
        # Not -inf: of that alone the softmax would be NaN. Beside any key that is seen, both weigh exactly 0.
        mask = unseen.to(qk.dtype).mul_(torch.finfo(qk.dtype).min).view(batch, heads, 1, -1)
        out = functional.scaled_dot_product_attention(qk, near, values, attn_mask=mask)
        alone = unseen.all(dim=1).view(batch, heads, 1, 1)
        itself = v.new_zeros(()) if self._all_shifted else v * (self._shift == 0).view(1, -1, 1, 1)
        return torch.where(alone, itself, out)

    def _attend_piece(self, qk: Tensor, v: Tensor, buckets: Tensor, counts: Tensor, memory: _Memory | None) -> Tensor:
        batch, heads, tokens, dim = qk.shape
        window = self.window
        wide = torch.promote_types(qk.dtype, torch.float32)
        buckets = buckets.long()
        offsets = torch.arange(tokens, device=qk.device)
        real = offsets < counts.unsqueeze(1)
        places = self.lengths.unsqueeze(1) + offsets
        self._write(qk, v, buckets, places, real)
        assert self._keys is not None and self._values is not None
        # Which earlier new tokens share a bucket: [B, H, R, t (query), t (key)].
        same = buckets.unsqueeze(-1) == buckets.unsqueeze(-2)
        same &= (offsets.unsqueeze(1) > offsets) & real[:, None, None, None, :]
        before = same.sum(dim=-1)
        # [B, H, R, t, W]: what the rings hold, and how many entries are newer.
        slots = torch.arange(window, device=qk.device)
        in_ring = self._rings.gather(-1, (buckets.unsqueeze(-1) * window + slots).flatten(-2))
        in_ring = in_ring.unflatten(-1, (tokens, window)).long()
        entered = self._counts.gather(-1, buckets).long().unsqueeze(-1)
        age = (entered - 1 - slots) % window
        seen = (in_ring != NOBODY) & (age < window - before.unsqueeze(-1))
        self._enter(buckets, places, before, real)
        # Rounds side by side: [B, H, t, R * W].
        in_ring, seen = (x.transpose(2, 3).flatten(-2) for x in (in_ring, seen))
        if not self.allow_duplicates:
            seen = seen & ~_given_before(in_ring, seen, window)
        index = in_ring.clamp_min(0).flatten(-2)
        keys = _take(self._keys, index).unflatten(2, (tokens, -1))
        values = _take(self._values, index + self._shift.view(1, -1, 1)).unflatten(2, (tokens, -1))
        factor = 1.0 / math.sqrt(dim)
        logits = (qk.unsqueeze(-2) @ keys.transpose(-1, -2)).squeeze(-2).to(wide) * factor
        parts = [logits.masked_fill(~seen, -math.inf)]
        if tokens > 1:
            times = same.sum(dim=2)
            if not self.allow_duplicates:
                times = times.clamp_max(1)
            own_keys = normalize_keys(qk, self.key_norm)
            among = (qk @ own_keys.transpose(-1, -2)).to(wide) * factor
            # A key met in so many rounds: its weight times that number.
            parts.append(among + times.to(wide).log())
        if memory is not None:
            parts.append(memory.logits(qk, factor))
        weights, alone = _softmax(parts, v.dtype)
        out = (weights[0].unsqueeze(-2) @ values).squeeze(-2)
        if tokens > 1:
            following = torch.where(self._shift.view(1, -1, 1, 1) == 1, v.roll(-1, dims=2), v)
            out = out + weights[1] @ following
        if memory is not None:
            out = out + weights[-1] @ memory.values
        early = places < self.full_attention_threshold
        if bool((early & real).any()):
            among_all, nobody = self._attend_to_all(qk, places, memory, int(places.max()))
            out = torch.where(early[:, None, :, None], among_all, out)
            alone = torch.where(early[:, None, :, None], nobody, alone)
        itself = (self._shift == 0).view(1, -1, 1, 1) & alone
        return torch.where(itself, v, out)

    def _attend_to_all(self, qk: Tensor, places: Tensor, memory: _Memory | None, last: int) -> tuple[Tensor, Tensor]:
        """Attention of tokens at these places over all before them; and which tokens have none before them."""
        assert self._keys is not None and self._values is not None
        count = min(last, self.full_attention_threshold) + 1
        wide = torch.promote_types(qk.dtype, torch.float32)
        factor = 1.0 / math.sqrt(qk.shape[-1])
        logits = (qk @ self._keys[:, :, :count].transpose(-1, -2)).to(wide) * factor
        earlier = torch.arange(logits.shape[-1], device=qk.device) < places.unsqueeze(-1)
        parts = [logits.masked_fill(~earlier.unsqueeze(1), -math.inf)]
        if memory is not None:
            parts.append(memory.logits(qk, factor))
        weights, alone = _softmax(parts, self._values.dtype)
        plain = self._values[:, :, : logits.shape[-1]]
        following = self._values[:, :, 1 : logits.shape[-1] + 1]
        out = weights[0] @ torch.where(self._shift.view(1, -1, 1, 1) == 1, following, plain)
        return (out if memory is None else out + weights[1] @ memory.values), alone


def _softmax(parts: list[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """One softmax over the last axis of all parts; and which rows [.., 1] see nothing: their weights are 0."""
    logits = torch.cat(parts, dim=-1)
    alone = logits.amax(dim=-1, keepdim=True) == -math.inf
    # A row of -inf alone gives NaN.
    weights = logits.softmax(dim=-1).masked_fill(alone, 0.0).to(dtype)
    return list(weights.split([part.shape[-1] for part in parts], dim=-1)), alone


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows [B, H, n, D] of x [B, H, T, D] at index [B, H, n]."""
    batch, heads, tokens, dim = x.shape
    first = torch.arange(batch * heads, device=x.device).view(batch, heads, 1) * tokens
    return x.reshape(-1, dim).index_select(0, (index + first).flatten()).view(*index.shape, dim)


def _given_before(positions: Tensor, seen: Tensor, window: int) -> Tensor:
    """Which entries [.., R * W] an earlier round has too."""
    count = positions.shape[-1]
    round_of = torch.arange(count, device=positions.device) // window
    equal = positions.unsqueeze(-1) == positions.unsqueeze(-2)
    return (equal & seen.unsqueeze(-2) & (round_of.unsqueeze(1) > round_of)).any(dim=-1)
