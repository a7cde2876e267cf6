"""LSH attention from the next tokens over all before them, at a cost that does not grow with their number.

What a token may see in a round is the window of the most recent earlier tokens in its bucket. So a ring of W positions
per head, round and bucket says all there is to know: a new token reads the R rings of its buckets, attends, and enters
them. Keys and values stay where they were written, by position. The sets are those of `reformer_lm.ops.lsh_attention`,
and so are the outputs, to rounding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from reformer_lm.ops.hashing import sort_by_bucket
from reformer_lm.ops.keys import KeyNorm, normalize_keys

# Tokens that attend at one time; more would gather more keys at once than it saves calls.
_MOST_AT_ONCE = 64
_SMALLEST_CAPACITY = 64
_NOBODY = -1


class LSHRings:
    """The tokens so far, as the LSH heads of one layer know them.

    Rows of the batch may have different numbers of tokens.

    Args:
        batch: rows.
        heads: LSH heads.
        rounds: hash rounds.
        num_buckets: buckets of a round.
        window: W, see `reformer_lm.ops.lsh_attention`, as are the next three.
        key_norm: length of the keys.
        num_shifted_heads: the last so many heads read what followed a match.
        allow_duplicates: whether a key met in several rounds counts once for each.
        full_attention_threshold: the first so many tokens attend to all before them.
        most_tokens: how many there will ever be, at most: room grows by doubling, but not beyond.
        device: where everything is.

    Attributes:
        lengths: int64 [B], tokens so far.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        rounds: int,
        num_buckets: int,
        *,
        window: int,
        key_norm: KeyNorm = "rms",
        num_shifted_heads: int = 0,
        allow_duplicates: bool = True,
        full_attention_threshold: int = 0,
        most_tokens: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.most_tokens = most_tokens
        self.window, self.key_norm, self.num_buckets = window, key_norm, num_buckets
        self.allow_duplicates, self.full_attention_threshold = allow_duplicates, full_attention_threshold
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        # Known without asking the device: the longest row, and whether all are as long.
        self._longest, self._even = 0, True
        # How far behind a match the value that is read stands.
        self._shift = (torch.arange(heads, device=device) >= heads - num_shifted_heads).long()
        self._all_shifted = num_shifted_heads >= heads
        shape = (batch, heads, rounds)
        # Ring of bucket b: places b * W to (b + 1) * W - 1; its i-th token ever stands at i mod W. Behind them all is
        # one more ring, where writes go that mean nothing.
        self._rings = torch.full((*shape, (num_buckets + 1) * window), _NOBODY, dtype=torch.int32, device=device)
        self._counts = torch.zeros((*shape, num_buckets + 1), dtype=torch.int32, device=device)
        # By position. What each token drove out of its ring makes steps back possible.
        self._buckets = torch.zeros((*shape, 0), dtype=torch.int32, device=device)
        self._driven_out = torch.zeros((*shape, 0), dtype=torch.int32, device=device)
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._number()

    def _number(self) -> None:
        """Numbers the rows, the rings of each (the first of every round) and the keys of each (the first)."""
        batch, heads, rounds, buckets = self._counts.shape
        device = self.lengths.device
        self._rows = torch.arange(batch, device=device)
        self._first_ring = torch.arange(batch * heads * rounds, device=device).view(batch, heads, rounds) * buckets
        stored = 0 if self._keys is None else self._keys.shape[2]
        self._first_key = torch.arange(batch * heads, device=device).unsqueeze(1) * stored
        # The value that belongs to a match, counted from its key.
        self._first_value = self._first_key + self._shift.repeat(batch).unsqueeze(1)

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        return self._buckets.shape[-1]

    def bytes(self) -> int:
        """Memory held."""
        held = [self._rings, self._counts, self._buckets, self._driven_out, self._keys, self._values, self.lengths]
        return sum(x.numel() * x.element_size() for x in held if x is not None)

    @torch.no_grad()
    def fill(self, qk_BHTD: Tensor, v_BHTD: Tensor, buckets_BHRT: Tensor, counts_B: Tensor | None = None) -> None:
        """Takes in the first tokens of all rows, whose attention has been computed otherwise.

        Args:
            qk_BHTD: shared query/key vectors [B, H, T, D].
            v_BHTD: values [B, H, T, D_v].
            buckets_BHRT: [B, H, R, T].
            counts_B: int64 [B], how many of the T tokens are real in each row: the first ones. None for all.
        """
        assert not self.lengths.any(), "the rings are not empty"
        tokens = qk_BHTD.shape[2]
        self._reserve(tokens, qk_BHTD, v_BHTD)
        assert self._keys is not None and self._values is not None
        self._keys[:, :, :tokens] = normalize_keys(qk_BHTD, self.key_norm)
        self._values[:, :, :tokens] = v_BHTD
        self._buckets[..., :tokens] = buckets_BHRT
        self._set_lengths(self.lengths + (tokens if counts_B is None else counts_B))
        self._rebuild()

    @torch.no_grad()
    def attend(
        self,
        qk_BHTD: Tensor,
        v_BHTD: Tensor,
        buckets_BHRT: Tensor,
        counts_B: Tensor | None = None,
        memory: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attention of new tokens over those before them, which they then join.

        Args:
            qk_BHTD: shared query/key vectors [B, H, T, D] of the new tokens.
            v_BHTD: their values [B, H, T, D_v].
            buckets_BHRT: their buckets [B, H, R, T].
            counts_B: see `fill`. Behind the real tokens of a row the output means nothing.
            memory: shared vectors [H, M, D] and values [H, M, D_v] that every token sees.

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
        step = min(self.window, _MOST_AT_ONCE)
        parts = []
        for begin in range(0, tokens, step):
            piece = slice(begin, begin + step)
            real = (counts_B - begin).clamp(0, min(step, tokens - begin))
            parts.append(
                self._attend_piece(qk_BHTD[:, :, piece], v_BHTD[:, :, piece], buckets_BHRT[..., piece], real, memory)
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

    def _set_lengths(self, lengths: Tensor) -> None:
        self.lengths = lengths
        known = lengths.tolist()
        self._longest, self._even = max(known), min(known) == max(known)

    def _attend_piece(
        self, qk: Tensor, v: Tensor, buckets: Tensor, counts: Tensor, memory: tuple[Tensor, Tensor] | None
    ) -> Tensor:
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
        seen = (in_ring != _NOBODY) & (age < window - before.unsqueeze(-1))
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
            parts.append((qk @ normalize_keys(memory[0], self.key_norm).transpose(-1, -2)).to(wide) * factor)
        weights, alone = _softmax(parts, v.dtype)
        out = (weights[0].unsqueeze(-2) @ values).squeeze(-2)
        if tokens > 1:
            following = torch.where(self._shift.view(1, -1, 1, 1) == 1, v.roll(-1, dims=2), v)
            out = out + weights[1] @ following
        if memory is not None:
            out = out + weights[-1] @ memory[1]
        early = places < self.full_attention_threshold
        if bool((early & real).any()):
            among_all, nobody = self._attend_to_all(qk, places, memory, int(places.max()))
            out = torch.where(early[:, None, :, None], among_all, out)
            alone = torch.where(early[:, None, :, None], nobody, alone)
        itself = (self._shift == 0).view(1, -1, 1, 1) & alone
        return torch.where(itself, v, out)

    def _attend_to_all(
        self, qk: Tensor, places: Tensor, memory: tuple[Tensor, Tensor] | None, last: int
    ) -> tuple[Tensor, Tensor]:
        """Attention of tokens at these places over all before them; and which tokens have none before them."""
        assert self._keys is not None and self._values is not None
        count = min(last, self.full_attention_threshold) + 1
        wide = torch.promote_types(qk.dtype, torch.float32)
        factor = 1.0 / math.sqrt(qk.shape[-1])
        logits = (qk @ self._keys[:, :, :count].transpose(-1, -2)).to(wide) * factor
        earlier = torch.arange(logits.shape[-1], device=qk.device) < places.unsqueeze(-1)
        parts = [logits.masked_fill(~earlier.unsqueeze(1), -math.inf)]
        if memory is not None:
            parts.append((qk @ normalize_keys(memory[0], self.key_norm).transpose(-1, -2)).to(wide) * factor)
        weights, alone = _softmax(parts, self._values.dtype)
        plain = self._values[:, :, : logits.shape[-1]]
        following = self._values[:, :, 1 : logits.shape[-1] + 1]
        out = weights[0] @ torch.where(self._shift.view(1, -1, 1, 1) == 1, following, plain)
        return (out if memory is None else out + weights[1] @ memory[1]), alone

    def _write(self, qk: Tensor, v: Tensor, buckets: Tensor, places: Tensor, real: Tensor) -> None:
        """Keys, values and buckets of new tokens to their places [B, t]."""
        assert self._keys is not None and self._values is not None
        rows, columns = real.nonzero(as_tuple=True)
        at = places[rows, columns]
        keys = normalize_keys(qk, self.key_norm)
        self._keys[rows, :, at] = keys[rows, :, columns]
        self._values[rows, :, at] = v[rows, :, columns]
        self._buckets[rows, :, :, at] = buckets[rows, :, :, columns].int()

    def _enter(self, buckets: Tensor, places: Tensor, before: Tensor, real: Tensor) -> None:
        """New tokens take their places in the rings; no more than W of them, so that each has a place of its own."""
        entered = self._counts.gather(-1, buckets).long() + before
        slot = buckets * self.window + entered % self.window
        old = self._rings.gather(-1, slot)
        rows, columns = real.nonzero(as_tuple=True)
        self._driven_out[rows, :, :, places[rows, columns]] = old[rows, :, :, columns]
        everybody = real[:, None, None, :].expand_as(slot)
        position = places[:, None, None, :].expand_as(slot).int()
        self._rings.scatter_(-1, torch.where(everybody, slot, self._rings.shape[-1] - 1), position)
        self._counts.scatter_add_(-1, buckets, everybody.int())
        self.lengths = self.lengths + real.sum(dim=1)

    def _reserve(self, tokens: int, qk: Tensor, v: Tensor) -> None:
        """Makes room, at least twice what there was, so that growing costs little on the whole."""
        if tokens <= self.capacity and self._keys is not None:
            return
        doubled = max(2 * self.capacity, _SMALLEST_CAPACITY)
        capacity = max(tokens, doubled if self.most_tokens is None else min(doubled, self.most_tokens))
        batch, heads = qk.shape[:2]
        # One place more: a shifted head looks one place behind a match.
        keys = qk.new_zeros(batch, heads, capacity + 1, qk.shape[-1])
        values = v.new_zeros(batch, heads, capacity + 1, v.shape[-1])
        if self._keys is not None and self._values is not None:
            keys[:, :, : self._keys.shape[2]] = self._keys
            values[:, :, : self._values.shape[2]] = self._values
        self._keys, self._values = keys, values
        self._buckets, self._driven_out = (
            torch.cat((x, x.new_zeros(*x.shape[:-1], capacity - x.shape[-1])), dim=-1)
            for x in (self._buckets, self._driven_out)
        )
        self._number()

    def _rebuild(self) -> None:
        """Rings, counts and what was driven out, from the buckets of all tokens."""
        longest = self._longest
        places = torch.arange(longest, device=self.lengths.device)
        # Behind a row's end stands a bucket of its own, which no ring belongs to.
        beyond = places >= self.lengths[:, None, None, None]
        buckets = self._buckets[..., :longest].long().masked_fill(beyond, self.num_buckets)
        order = sort_by_bucket(buckets)
        sorted_buckets = buckets.gather(-1, order.order)
        in_bucket = places - order.start
        sizes = torch.zeros_like(self._counts, dtype=torch.int64)
        sizes.scatter_add_(-1, buckets, torch.ones_like(buckets))
        self._counts = sizes.int()
        self._counts[..., self.num_buckets] = 0
        newest = in_bucket >= sizes.gather(-1, sorted_buckets) - self.window
        newest &= sorted_buckets < self.num_buckets
        slot = sorted_buckets * self.window + in_bucket % self.window
        self._rings.fill_(_NOBODY)
        self._rings.scatter_(-1, torch.where(newest, slot, self._rings.shape[-1] - 1), order.order.int())
        earlier = order.order.gather(-1, (places - self.window).clamp_min(0).expand_as(order.order))
        driven_out = torch.where(in_bucket >= self.window, earlier, _NOBODY)
        self._driven_out[..., :longest] = driven_out.gather(-1, order.inverse).int()

    @torch.no_grad()
    def crop(self, lengths_B: Tensor) -> None:
        """Forgets the tokens behind the first ``lengths_B`` (int64 [B]) of each row.

        Raises:
            ValueError: there are fewer.
        """
        if bool((lengths_B > self.lengths).any() | (lengths_B < 0).any()):
            raise ValueError(f"cannot crop to {lengths_B.tolist()} tokens: there are {self.lengths.tolist()}")
        steps = int((self.lengths - lengths_B).max())
        if steps > _MOST_AT_ONCE:
            self._set_lengths(lengths_B.clone())
            self._rebuild()
            return
        for _ in range(steps):
            self._step_back(self.lengths > lengths_B)
        self._set_lengths(self.lengths)

    def _step_back(self, rows: Tensor) -> None:
        """The last token of these rows leaves its rings, and what it drove out comes back."""
        (index,) = rows.nonzero(as_tuple=True)
        self.lengths = self.lengths - rows.long()
        last = self.lengths[index]
        # [n, H, R]
        bucket = self._buckets[index, :, :, last].long()
        heads, rounds = (torch.arange(size, device=index.device) for size in bucket.shape[1:])
        where = (index[:, None, None], heads[:, None], rounds)
        entered = self._counts[(*where, bucket)] - 1
        self._counts[(*where, bucket)] = entered
        slot = bucket * self.window + entered.long() % self.window
        self._rings[(*where, slot)] = self._driven_out[index, :, :, last]

    @torch.no_grad()
    def select(self, index: Tensor) -> None:
        """Makes row i what row ``index[i]`` (int64) was: to reorder beams, to repeat or to leave out rows."""
        self.lengths = self.lengths.index_select(0, index)
        self._rings, self._counts, self._buckets, self._driven_out = (
            x.index_select(0, index) for x in (self._rings, self._counts, self._buckets, self._driven_out)
        )
        if self._keys is not None and self._values is not None:
            self._keys, self._values = self._keys.index_select(0, index), self._values.index_select(0, index)
        self._set_lengths(self.lengths)
        self._number()


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
