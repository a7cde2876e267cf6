"""Local attention from the next tokens, over a ring of the last ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Tokens that attend at one time, at most.
_MOST_AT_ONCE = 64


class LocalRing:
    """Keys and values of the last tokens, as the local heads of one layer need them.

    The ring is longer than the window, so that the last tokens can be taken back. Rows of the batch may have different
    numbers of tokens.

    Args:
        batch: rows.
        window: tokens that a token sees, itself included.
        self_bias: added to a token's logit with itself.
        device: where keys and values are.

    Attributes:
        lengths: int64 [B], tokens so far.
    """

    def __init__(self, batch: int, *, window: int, self_bias: float = 0.0, device: torch.device | str = "cpu") -> None:
        self.window, self.self_bias = window, self_bias
        self.size = window + max(window, _MOST_AT_ONCE)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        # The most tokens there ever were: the ring holds the last of these, whatever was taken back since.
        self._newest = self.lengths
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
        assert not self.lengths.any(), "the ring is not empty"
        tokens = k_BHTD.shape[2]
        counts = torch.full_like(self.lengths, tokens) if counts_B is None else counts_B
        # The last ones of each row.
        offsets = torch.arange(min(self.size, tokens), device=self.lengths.device)
        places = (counts - len(offsets)).clamp_min(0).unsqueeze(1) + offsets
        self._reserve(k_BHTD, v_BHTD)
        real = places < counts.unsqueeze(1)
        index = places.clamp_max(tokens - 1)[:, None, :, None]
        last_k, last_v = (x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in (k_BHTD, v_BHTD))
        self._write(last_k, last_v, places, real)
        self.lengths = self._newest = self.lengths + counts

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
        counts = torch.full_like(self.lengths, tokens) if counts_B is None else counts_B
        self._reserve(k_BHTD, v_BHTD)
        parts = []
        for begin in range(0, tokens, _MOST_AT_ONCE):
            piece = slice(begin, begin + _MOST_AT_ONCE)
            real = (counts - begin).clamp(0, min(_MOST_AT_ONCE, tokens - begin))
            parts.append(self._attend_piece(q_BHTD[:, :, piece], k_BHTD[:, :, piece], v_BHTD[:, :, piece], real))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _attend_piece(self, q: Tensor, k: Tensor, v: Tensor, counts: Tensor) -> Tensor:
        assert self._keys is not None and self._values is not None
        tokens = q.shape[2]
        offsets = torch.arange(tokens, device=q.device)
        places = self.lengths.unsqueeze(1) + offsets
        self._write(k, v, places, offsets < counts.unsqueeze(1))
        # What stands at each place of the ring, now that the new tokens are in: the last position that falls there,
        # if a query may see it. [B, 1, t, size]
        slots = torch.arange(self.size, device=q.device)
        back = (places.unsqueeze(-1) - slots) % self.size
        seen = (back < self.window) & (back <= places.unsqueeze(-1))
        logits = (q @ self._keys.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32))
        logits = logits / math.sqrt(q.shape[-1]) + self.self_bias * (back == 0).unsqueeze(1)
        weights = logits.masked_fill(~seen.unsqueeze(1), -math.inf).softmax(dim=-1)
        self.lengths = self.lengths + counts
        self._newest = torch.maximum(self._newest, self.lengths)
        return weights.to(v.dtype) @ self._values

    def _write(self, k: Tensor, v: Tensor, places: Tensor, real: Tensor) -> None:
        assert self._keys is not None and self._values is not None
        rows, columns = real.nonzero(as_tuple=True)
        at = places[rows, columns] % self.size
        self._keys[rows, :, at] = k[rows, :, columns]
        self._values[rows, :, at] = v[rows, :, columns]

    def _reserve(self, k: Tensor, v: Tensor) -> None:
        if self._keys is None:
            self._keys = k.new_zeros(*k.shape[:2], self.size, k.shape[-1])
            self._values = v.new_zeros(*v.shape[:2], self.size, v.shape[-1])

    def crop(self, lengths_B: Tensor) -> None:
        """Forgets the tokens behind the first ``lengths_B`` (int64 [B]) of each row.

        Raises:
            ValueError: there are fewer, or tokens that would be seen again have been overwritten.
        """
        if bool((lengths_B > self.lengths).any() | (lengths_B < 0).any()):
            raise ValueError(f"cannot crop to {lengths_B.tolist()} tokens: there are {self.lengths.tolist()}")
        # Of the newest tokens that ever were the ring holds the last `size`.
        lost = self._newest - self.size > (lengths_B - self.window + 1).clamp_min(0)
        if bool(lost.any()):
            raise ValueError(
                f"cannot crop to {lengths_B.tolist()} tokens: local heads remember the last {self.size} of "
                f"{self._newest.tolist()} only, so at most {self.size - self.window + 1} can be taken back"
            )
        self.lengths = lengths_B.clone()

    def select(self, index: Tensor) -> None:
        """Makes row i what row ``index[i]`` (int64) was."""
        self.lengths, self._newest = (x.index_select(0, index) for x in (self.lengths, self._newest))
        if self._keys is not None and self._values is not None:
            self._keys, self._values = self._keys.index_select(0, index), self._values.index_select(0, index)
