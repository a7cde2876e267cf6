"""What an LSH attention call computed, kept for a second call on the same input."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class KeptAttention:
    """Filled by the first `reformer_lm.ops.lsh_attention` call it is given to, so that the second computes nothing.

    The second call, for the sake of its backward pass, has the same input, settings and, with dropout, random state.

    Attributes:
        out: [B, H, T, D_v], the merged output.
        logsumexp: [B * H, T], of the merged softmax, in the backend's base.
        order: int32 [B, H, R, T], positions in sorted order.
        start: int32 [B, H, R, T], first place of each place's bucket.
        matched: bool [B, H, T], which tokens found any other.
    """

    out: Tensor | None = None
    logsumexp: Tensor | None = None
    order: Tensor | None = None
    start: Tensor | None = None
    matched: Tensor | None = None

    @property
    def is_filled(self) -> bool:
        """Whether a first call has been made."""
        return self.out is not None

    def fill(self, out: Tensor, logsumexp: Tensor, order: Tensor, start: Tensor) -> None:
        """Keeps what a backend's forward pass saves for its backward pass."""
        self.out, self.logsumexp, self.order, self.start = out.detach(), logsumexp, order, start
