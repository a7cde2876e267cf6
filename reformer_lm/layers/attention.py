"""Self-attention whose heads are split among local and LSH attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from reformer_lm.config import ReformerLMConfig
from reformer_lm.layers.compaction import Compaction, document_positions
from reformer_lm.layers.norms import ResidualLinear
from reformer_lm.layers.positions import apply_rotary, rotary_angles
from reformer_lm.ops.hashing import factorize_buckets, hash_vectors, sample_rotations
from reformer_lm.ops.keys import SELF_ATTENTION_BIAS, normalize_keys
from reformer_lm.ops.local import local_attention
from reformer_lm.ops.lsh import lsh_attention
from reformer_lm.ops.lsh_chunked import chunked_lsh_attention
from reformer_lm.ops.shared_qk import shared_qk_attention

# A prime larger than any count of layers or steps, to keep seeds apart.
_SEED_STRIDE = 1_000_000_007


@dataclass(frozen=True)
class SequenceInfo:
    """What every layer knows of the sequence besides the hidden states.

    Attributes:
        position_ids: int64 [B or 1, T].
        mask: optional bool [B, T], True for real tokens. Needed in chunked mode only: in causal mode padding stands
            behind the last real token, where nothing real can see it.
        documents: optional int64 [B, T], constant over each document; tokens see their own document only.
        attention_mask: optional bool [B or 1, T, T], True where a query may see a key; chunked mode only.
        context: optional [B, C, hidden_size], vectors of another sequence that every token sees; chunked mode only.
        context_mask: optional bool [B, C], False for padding of the context.
        hash_step: number of the training step with ``rehash="step"``, else None (fixed rotations).
    """

    position_ids: Tensor
    mask: Tensor | None = None
    documents: Tensor | None = None
    attention_mask: Tensor | None = None
    context: Tensor | None = None
    context_mask: Tensor | None = None
    hash_step: int | None = None


class Projections(NamedTuple):
    """What the heads of one layer work on.

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


class LSHSelfAttention(nn.Module):
    """Multi-head causal self-attention; the first ``num_local_heads`` heads are local, the others LSH.

    LSH heads share one projection for queries and keys and find far matches; local heads see the last
    ``local_window`` tokens and keep short-range order. Source: Kitaev et al. 2020, section 2; the local heads follow
    Roy et al. 2020 (arXiv 2003.05997), section 4.
    """

    def __init__(self, config: ReformerLMConfig, layer_index: int) -> None:
        super().__init__()
        assert config.head_dim is not None and config.local_window is not None and config.lsh_window is not None
        self.config = config
        self.layer_index = layer_index
        self.heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.local_heads = config.local_heads_of(layer_index)
        self.lsh_heads = self.heads - self.local_heads
        self.shifted_heads = config.shifted_heads_of(layer_index)
        self.local_window = config.local_window
        self.lsh_window = config.lsh_window
        self.causal = config.lsh_mask == "causal"
        width = self.heads * self.head_dim
        self.query_key = nn.Linear(config.hidden_size, width, bias=False)
        self.value = nn.Linear(config.hidden_size, width, bias=False)
        self.output = ResidualLinear(width, config.hidden_size)
        self.output_dropout = nn.Dropout(config.hidden_dropout_prob)
        if self.local_heads and config.local_keys == "separate":
            self.local_key = nn.Linear(config.hidden_size, self.local_heads * self.head_dim, bias=False)
        # Learned vectors in the place of hidden states, projected like them. Source: reformer-pytorch's num_mem_kv,
        # after Sukhbaatar et al. 2019 (arXiv 1907.01470), section 4.
        self.memory: nn.Parameter | None = None
        if config.num_mem_kv and self.lsh_heads:
            self.memory = nn.Parameter(torch.randn(config.num_mem_kv, config.hidden_size))
        # Rotations follow from the seed alone, so they are made on first use and never saved.
        self._rotations: dict[tuple[object, ...], tuple[Tensor, ...]] = {}

    def rotations(self, num_buckets: int, hash_step: int | None, device: torch.device) -> tuple[Tensor, ...]:
        """The random rotations of this layer.

        Args:
            num_buckets: buckets per round.
            hash_step: None for the fixed ones, else the number of the training step.
            device: where they are needed.

        Returns:
            One float32 tensor [H, D, R, n / 2] per bucket factor n.
        """
        key = (num_buckets, hash_step, device)
        if key not in self._rotations:
            # Distinct seeds for (hash_seed, layer, step); 0 stands for the fixed rotations.
            step = 0 if hash_step is None else hash_step + 1
            seed = ((self.config.hash_seed * _SEED_STRIDE + self.layer_index) * _SEED_STRIDE + step) % 2**63
            fresh = sample_rotations(
                self.lsh_heads, self.head_dim, self.config.num_hashes, factorize_buckets(num_buckets), seed
            )
            # A dictionary of one: a new step or length replaces what the last one used.
            self._rotations = {key: tuple(rotation.to(device) for rotation in fresh)}
        return self._rotations[key]

    def forward(self, x: Tensor, info: SequenceInfo, buckets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Attends.

        Args:
            x: hidden states [B, T, hidden_size].
            info: positions, mask and step.
            buckets: buckets [B, H_lsh, R, T] of an earlier call on the same input, to be used again.

        Returns:
            The output [B, T, hidden_size], and the buckets used (None where nothing was hashed).
        """
        merged, buckets = self.attend(self.project(x, info), info, buckets, self._dropout_p())
        out = self.output(merged.transpose(1, 2).flatten(2))
        return self.output_dropout(out), buckets

    def project(self, x: Tensor, info: SequenceInfo) -> Projections:
        """Queries, keys and values of hidden states [B, T, hidden_size], and of memory and context."""
        extra_states = [] if self.memory is None else [self.memory.to(x.dtype).expand(x.shape[0], -1, -1)]
        if info.context is not None and self.lsh_heads:
            extra_states.append(info.context.to(x.dtype))
        extra = None
        if extra_states:
            states = torch.cat(extra_states, dim=1)
            # Local heads see neither.
            skip = self.local_heads * self.head_dim
            extra = (
                self._split(functional.linear(states, self.query_key.weight[skip:])),
                self._split(functional.linear(states, self.value.weight[skip:])),
            )
        separate = self.local_heads and self.config.local_keys == "separate"
        local_key = self._split(self.local_key(x)) if separate else None
        return Projections(self._split(self.query_key(x)), self._split(self.value(x)), local_key, extra)

    def attend(
        self, heads: Projections, info: SequenceInfo, buckets: Tensor | None, dropout_p: float
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of all heads, before the output projection.

        Args:
            heads: from `project`.
            info: see `forward`.
            buckets: see `forward`.
            dropout_p: probability of dropping an attention weight.

        Returns:
            [B, H, T, D_v], and the buckets used (None where nothing was hashed).
        """
        query_key, value, local_key, extra = heads
        parts = []
        if self.local_heads:
            local = (query_key[:, : self.local_heads], local_key, value[:, : self.local_heads])
            parts.append(self._local(*local, info, dropout_p))
        if self.lsh_heads:
            shared, value = query_key[:, self.local_heads :], value[:, self.local_heads :]
            attend = self._lsh_causal if self.causal else self._lsh_chunked
            out, buckets = attend(shared, value, extra, info, buckets, dropout_p)
            parts.append(out)
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0], buckets

    def _split(self, x: Tensor) -> Tensor:
        """[B, T, H * D] -> [B, H, T, D]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _dropout_p(self) -> float:
        return self.config.attention_dropout if self.training else 0.0

    def _local(self, q: Tensor, keys: Tensor | None, v: Tensor, info: SequenceInfo, dropout_p: float) -> Tensor:
        shared = keys is None
        if keys is None:
            keys = normalize_keys(q, self.config.key_norm)
        if self.config.local_rotary:
            angles = rotary_angles(info.position_ids, self.head_dim, _at_least_float32(q.dtype))
            q, keys = apply_rotary(q, angles), apply_rotary(keys, angles)
        return local_attention(
            q,
            keys,
            v,
            window=self.local_window,
            exact_window=self.causal,
            self_bias=SELF_ATTENTION_BIAS if shared else 0.0,
            dropout_p=dropout_p,
            mask_BT=info.mask,
            documents_BT=info.documents,
        )

    def _hash(self, shared: Tensor, num_buckets: int, info: SequenceInfo, buckets: Tensor | None) -> Tensor:
        if buckets is not None:
            return buckets
        return hash_vectors(shared, self.rotations(num_buckets, info.hash_step, shared.device))

    def _rotate(self, shared: Tensor, info: SequenceInfo) -> Tensor:
        # After hashing: a match is one of content, wherever it stands.
        if self.config.position_type != "rotary":
            return shared
        return apply_rotary(shared, rotary_angles(info.position_ids, self.head_dim, _at_least_float32(shared.dtype)))

    def _lsh_causal(
        self,
        shared: Tensor,
        v: Tensor,
        extra: tuple[Tensor, Tensor] | None,
        info: SequenceInfo,
        buckets: Tensor | None,
        dropout_p: float,
    ) -> tuple[Tensor, Tensor | None]:
        config = self.config
        # The first positions attend to everything before them, whatever the length: a rule by position keeps the
        # model exactly causal, one by length (the peers') would not.
        rotated = self._rotate(shared, info)
        threshold = config.full_attention_threshold
        begin = _BeginningsInFront(shared.shape[2], threshold, info.documents) if threshold else None
        head = None
        if begin is not None:
            head = shared_qk_attention(
                begin.take(rotated),
                begin.take(v),
                key_norm=config.key_norm,
                num_shifted_heads=self.shifted_heads,
                dropout_p=dropout_p,
                documents_BT=begin.documents,
                extra=extra,
            )
            if begin.is_all:
                return head, None
        assert config.num_buckets is not None
        buckets = self._hash(shared, config.num_buckets, info, buckets)
        out = lsh_attention(
            rotated,
            v,
            buckets,
            window=self.lsh_window,
            key_norm=config.key_norm,
            num_shifted_heads=self.shifted_heads,
            dropout_p=dropout_p,
            allow_duplicates=config.allow_duplicate_attention,
            documents_BT=info.documents,
            # Memory is the same in every row.
            memory=None if extra is None else (extra[0][0], extra[1][0]),
        )
        return (out if begin is None or head is None else begin.replace(out, head)), buckets

    def _lsh_chunked(
        self,
        shared: Tensor,
        v: Tensor,
        extra: tuple[Tensor, Tensor] | None,
        info: SequenceInfo,
        buckets: Tensor | None,
        dropout_p: float,
    ) -> tuple[Tensor, Tensor | None]:
        config = self.config
        tokens = shared.shape[2]
        rotated = self._rotate(shared, info)
        extra_mask = None
        if extra is not None and info.context_mask is not None:
            learned = extra[0].shape[2] - info.context_mask.shape[1]
            extra_mask = functional.pad(info.context_mask, (learned, 0), value=True)
        length = tokens + (0 if extra is None else extra[0].shape[2])
        if length <= config.full_attention_threshold:
            # Unrotated, as reformer-pytorch has it.
            out = shared_qk_attention(
                shared,
                v,
                key_norm=config.key_norm,
                num_shifted_heads=self.shifted_heads,
                dropout_p=dropout_p,
                mask_BT=info.mask,
                attention_mask_BTT=info.attention_mask,
                documents_BT=info.documents,
                extra=extra,
                extra_mask_BE=extra_mask,
            )
            return out, None
        # reformer-pytorch's rule: as many buckets as the current length has chunks.
        num_buckets = config.num_buckets or max(2, 2 * -(-length // (2 * config.bucket_size)))
        mask = info.mask
        if extra is not None:
            # They are hashed and sorted with the tokens, behind which they stand.
            shared, rotated = (torch.cat((x, extra[0]), dim=2) for x in (shared, rotated))
            v = torch.cat((v, extra[1]), dim=2)
            if mask is not None or extra_mask is not None:
                real = shared.new_ones(shared.shape[0], length, dtype=torch.bool)
                if mask is not None:
                    real[:, :tokens] = mask
                if extra_mask is not None:
                    real[:, tokens:] = extra_mask
                mask = real
        buckets = self._hash(shared, num_buckets, info, buckets)
        out = chunked_lsh_attention(
            rotated,
            v,
            buckets,
            chunk_size=config.bucket_size,
            key_norm=config.key_norm,
            attend_across_buckets=config.attend_across_buckets,
            allow_duplicates=config.allow_duplicate_attention,
            num_shifted_heads=self.shifted_heads,
            dropout_p=dropout_p,
            mask_BT=mask,
            attention_mask_BTT=info.attention_mask,
            documents_BT=info.documents,
            num_queries=tokens,
        )
        return out, buckets


class _BeginningsInFront:
    """The first ``threshold`` tokens of the sequence, or of each document, side by side.

    Attributes:
        documents: [B, L] for the tokens taken, or None.
        is_all: whether these are all the tokens.
    """

    def __init__(self, tokens: int, threshold: int, documents: Tensor | None) -> None:
        self.count = min(tokens, threshold)
        self.is_all = self.count == tokens
        self.order: Compaction | None = None
        self.documents = documents
        if documents is None or self.is_all:
            return
        order = Compaction(document_positions(tokens, documents, documents.device) < threshold)
        self.is_all = bool(order.real.all())
        if not self.is_all:
            self.order = order
            # Rows with fewer such tokens are filled up by a document that nobody reads.
            self.documents = order.pack(documents).masked_fill(~order.mask, int(documents.max()) + 1)

    def take(self, x: Tensor) -> Tensor:
        """[B, H, T, D] -> [B, H, L, D]."""
        if self.is_all:
            return x
        if self.order is None:
            return x[:, :, : self.count]
        return self.order.pack(x.transpose(1, 2).flatten(2)).unflatten(2, (x.shape[1], -1)).transpose(1, 2)

    def replace(self, x: Tensor, taken: Tensor) -> Tensor:
        """[B, H, T, D] with what was computed of the tokens taken, [B, H, L, D], in their places."""
        if self.order is None:
            return torch.cat((taken, x[:, :, self.count :]), dim=2)
        placed = self.order.unpack(taken.transpose(1, 2).flatten(2))
        placed = placed.unflatten(2, (x.shape[1], -1)).transpose(1, 2)
        return torch.where(self.order.real[:, None, :, None], placed, x)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
