"""What LSH attention has to remember of the tokens so far: rings of all buckets, and keys and values by position."""

from __future__ import annotations

import torch
from torch import Tensor

from reformer_lm.ops.hashing import sort_by_bucket
from reformer_lm.ops.keys import KeyNorm, normalize_keys

# Tokens that enter the rings at one time, at most; and how many steps back are taken one by one.
MOST_AT_ONCE = 64
_SMALLEST_CAPACITY = 64
NOBODY = -1


class RingState:
    """The tokens so far, as the LSH heads of one layer know them; `LSHRings` attends over them.

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
        self._rings = torch.full((*shape, (num_buckets + 1) * window), NOBODY, dtype=torch.int32, device=device)
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

    def _set_lengths(self, lengths: Tensor) -> None:
        self.lengths = lengths
        known = lengths.tolist()
        self._longest, self._even = max(known), min(known) == max(known)

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
        self._rings.fill_(NOBODY)
        self._rings.scatter_(-1, torch.where(newest, slot, self._rings.shape[-1] - 1), order.order.int())
        earlier = order.order.gather(-1, (places - self.window).clamp_min(0).expand_as(order.order))
        driven_out = torch.where(in_bucket >= self.window, earlier, NOBODY)
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
        if steps > MOST_AT_ONCE:
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
