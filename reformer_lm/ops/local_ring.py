"""Local attention from the next tokens, over the last ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

# Tokens that attend at one time, at most.
_MOST_AT_ONCE = 64


class LocalRing:
    """Keys and values of the last tokens, as the local heads of one layer need them.

    They stand in a strip, the newest last; where it is full, the last `size` move to its front. More is kept than the
    window, so that the last tokens can be taken back. Rows of the batch may have different numbers of tokens: they end
    at the same place, and begin at different ones.

    Args:
        batch: rows.
        window: tokens that a token sees, itself included.
        self_bias: added to a token's logit with itself.
        device: where keys and values are.

    Attributes:
        lengths: int64 [B], tokens so far.
        size: tokens remembered, if there were so many.
    """

    def __init__(self, batch: int, *, window: int, self_bias: float = 0.0, device: torch.device | str = "cpu") -> None:
        self.window, self.self_bias = window, self_bias
        self.size = window + max(window, _MOST_AT_ONCE)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self._end = 0
        # Where each row begins; and the same, known without asking the device.
        self._begin = torch.zeros(batch, dtype=torch.int64, device=device)
        self._first_begin = self._last_begin = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def bytes(self) -> int:
        """Memory held."""
        return sum(x.numel() * x.element_size() for x in (self._keys, self._values, self.lengths) if x is not None)

    @torch.no_grad()
    def fill(self, k_BHTD: Tensor, v_BHTD: Tensor, counts_B: Tensor | None = None) -> None:
        """Takes in the first tokens of all rows, whose attention has been computed otherwise.

        Args:
            k_BHTD: keys [B, H, T, D].
            v_BHTD: values [B, H, T, D_v].
            counts_B: int64 [B], how many of the T tokens are real in each row: the first ones. None for all.
        """
        assert not self._end, "the ring is not empty"
        tokens = k_BHTD.shape[2]
        self._make_room(0, k_BHTD, v_BHTD)
        assert self._keys is not None and self._values is not None
        self._end = kept = min(self.size, tokens)
        if counts_B is None:
            self._keys[:, :, :kept], self._values[:, :, :kept] = k_BHTD[:, :, -kept:], v_BHTD[:, :, -kept:]
            self.lengths = self.lengths + tokens
            return
        # The last ones of each row, side by side at the end.
        places = counts_B.unsqueeze(1) - kept + torch.arange(kept, device=counts_B.device)
        for strip, x in ((self._keys, k_BHTD), (self._values, v_BHTD)):
            strip[:, :, :kept] = _columns(x, places)
        self.lengths = self.lengths + counts_B
        self._set_begin((kept - counts_B).clamp_min(0))

    @torch.no_grad()
    def attend(self, q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, counts_B: Tensor | None = None) -> Tensor:
        """Attention of new tokens over the window before them and themselves; they then join.

        Args:
            q_BHTD: queries [B, H, T, D] of the new tokens. Logits are scaled by 1 / sqrt(D).
            k_BHTD: their keys.
            v_BHTD: their values [B, H, T, D_v].
            counts_B: see `fill`. Behind the real tokens of a row the output means nothing.

        Returns:
            [B, H, T, D_v] in the dtype of ``v_BHTD``.
        """
        tokens = q_BHTD.shape[2]
        parts = []
        for begin in range(0, tokens, _MOST_AT_ONCE):
            piece = slice(begin, begin + _MOST_AT_ONCE)
            count = min(_MOST_AT_ONCE, tokens - begin)
            parts.append(self._attend_piece(q_BHTD[:, :, piece], k_BHTD[:, :, piece], v_BHTD[:, :, piece]))
            if counts_B is None:
                self.lengths = self.lengths + count
            else:
                real = (counts_B - begin).clamp(0, count)
                self.lengths = self.lengths + real
                # The others had no place here: each row moves up behind its last token.
                self._move_right(count - real)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _attend_piece(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = q.shape[2]
        self._make_room(tokens, k, v)
        assert self._keys is not None and self._values is not None
        new = slice(self._end, self._end + tokens)
        self._keys[:, :, new], self._values[:, :, new] = k, v
        first = max(self._first_begin, new.start - self.window + 1)
        seen = slice(first, new.stop)
        mask = None
        if tokens > 1 or self.self_bias or self._last_begin > first:
            mask = self._mask(seen, new, q.dtype)
        self._end = new.stop
        return functional.scaled_dot_product_attention(q, self._keys[:, :, seen], self._values[:, :, seen], mask)

    def _mask(self, seen: slice, new: slice, dtype: torch.dtype) -> Tensor:
        """What is added to the logits of the new tokens (rows) with the keys they may see (columns)."""
        device = self.lengths.device
        columns, rows = (torch.arange(x.start, x.stop, device=device) for x in (seen, new))
        back = rows.unsqueeze(1) - columns
        allowed = (back >= 0) & (back < self.window)
        if self._last_begin > seen.start:
            allowed = allowed & (columns >= self._begin[:, None, None, None])
        bias = torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, -math.inf)
        return bias + self.self_bias * (back == 0) if self.self_bias else bias

    def _make_room(self, tokens: int, k: Tensor, v: Tensor) -> None:
        if self._keys is None or self._values is None:
            self._keys = k.new_zeros(*k.shape[:2], 2 * self.size, k.shape[-1])
            self._values = v.new_zeros(*v.shape[:2], 2 * self.size, v.shape[-1])
        if self._end + tokens > 2 * self.size:
            moved = self._end - self.size
            for strip in (self._keys, self._values):
                strip[:, :, : self.size] = strip[:, :, moved : self._end].clone()
            self._end = self.size
            self._begin = (self._begin - moved).clamp_min(0)
            self._first_begin, self._last_begin = (max(0, x - moved) for x in (self._first_begin, self._last_begin))

    def _move_right(self, steps_B: Tensor) -> None:
        """Moves each row by so many places; what was behind is lost."""
        assert self._keys is not None and self._values is not None
        places = torch.arange(self._end, device=steps_B.device) - steps_B.unsqueeze(1)
        for strip in (self._keys, self._values):
            strip[:, :, : self._end] = _columns(strip, places)
        self._set_begin(self._begin + steps_B)

    def _set_begin(self, begin: Tensor) -> None:
        self._begin = begin
        known = begin.tolist()
        self._first_begin, self._last_begin = min(known), max(known)

    def crop(self, lengths_B: Tensor) -> None:
        """Forgets the tokens behind the first ``lengths_B`` (int64 [B]) of each row.

        Raises:
            ValueError: there are fewer, or tokens that would be seen again are forgotten already.
        """
        if bool((lengths_B > self.lengths).any() | (lengths_B < 0).any()):
            raise ValueError(f"cannot crop to {lengths_B.tolist()} tokens: there are {self.lengths.tolist()}")
        steps = self.lengths - lengths_B
        left = self._end - steps - self._begin
        if bool((left < lengths_B.clamp_max(self.window - 1)).any()):
            raise ValueError(
                f"cannot crop to {lengths_B.tolist()} tokens: of {self.lengths.tolist()} local heads remember the last "
                f"{(self._end - self._begin).tolist()}, and the {self.window - 1} before a token must be among them: "
                f"at most {(self._end - self._begin - self.window + 1).clamp_min(0).tolist()} can be taken back"
            )
        self.lengths = lengths_B.clone()
        fewest = int(steps.min())
        if bool((steps != fewest).any()):
            self._move_right(steps - fewest)
        self._end -= fewest
        if not bool(lengths_B.any()):
            self._end = 0
            self._set_begin(torch.zeros_like(self._begin))

    def select(self, index: Tensor) -> None:
        """Makes row i what row ``index[i]`` (int64) was."""
        self.lengths = self.lengths.index_select(0, index)
        self._set_begin(self._begin.index_select(0, index))
        if self._keys is not None and self._values is not None:
            self._keys, self._values = self._keys.index_select(0, index), self._values.index_select(0, index)


def _columns(x: Tensor, places: Tensor) -> Tensor:
    """X [B, H, T, D] at places [B, n], which may lie before its first: [B, H, n, D]."""
    index = places.clamp_min(0)[:, None, :, None]
    return x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))
