"""What the heads of one attention layer work on and leave behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import pad

from reformer_lm.layers.sequence import SequenceInfo
from reformer_lm.ops.kept_attention import KeptAttention


@dataclass
class AttentionReplay:
    """What it takes to repeat the attention of some heads on the same input; filled by the first call.

    Attributes:
        buckets: [B, H_lsh, R, T], since a hash taken anew could fall differently; None where nothing was hashed.
        kept: what the LSH heads computed, if that is to be kept.
    """

    buckets: Tensor | None = None
    kept: KeptAttention | None = None


class HeadGroup(NamedTuple):
    """Heads ``begin`` to ``end`` - 1 of a layer, worked off together."""

    begin: int
    end: int

    @property
    def size(self) -> int:
        """How many heads these are."""
        return self.end - self.begin


class Projections(NamedTuple):
    """What the heads of one layer, or of a group of them, work on.

    Attributes:
        query_key: [B, H, T, D]; of the local heads only queries where they have keys of their own.
        value: [B, H, T, D_v].
        local_key: [B, H_local, T, D], or None where local heads share queries and keys.
        extra: shared vectors [B, H_lsh, E, D] and values [B, H_lsh, E, D_v] of the learned memory and then the
            context, which every token sees; or None.
    """

    query_key: Tensor
    value: Tensor
    local_key: Tensor | None
    extra: tuple[Tensor, Tensor] | None


def mask_of_extra(extra: tuple[Tensor, Tensor] | None, info: SequenceInfo) -> Tensor | None:
    """Which of the E extra vectors each row sees: bool [B, E], or None for all. The learned ones come first."""
    if extra is None or info.context_mask is None:
        return None
    learned = extra[0].shape[2] - info.context_mask.shape[1]
    return pad(info.context_mask, (learned, 0), value=True)


def memory_of(extra: tuple[Tensor, Tensor] | None, has_context: bool) -> tuple[Tensor, Tensor] | None:
    """Extra vectors and values as LSH attention takes them: learned memory alone is the same in every row."""
    if extra is None or has_context:
        return extra
    return extra[0][0], extra[1][0]
