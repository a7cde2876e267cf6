"""Self-attention whose heads are split among local and LSH attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reformer_lm.config import ReformerLMConfig
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
        hash_step: number of the training step with ``rehash="step"``, else None (fixed rotations).
    """

    position_ids: Tensor
    mask: Tensor | None = None
    hash_step: int | None = None


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
        query_key, value = self._split(self.query_key(x)), self._split(self.value(x))
        parts = []
        if self.local_heads:
            own_keys = self._split(self.local_key(x)) if self.config.local_keys == "separate" else None
            parts.append(self._local(query_key[:, : self.local_heads], own_keys, value[:, : self.local_heads], info))
        if self.lsh_heads:
            shared, value = query_key[:, self.local_heads :], value[:, self.local_heads :]
            attend = self._lsh_causal if self.causal else self._lsh_chunked
            out, buckets = attend(shared, value, info, buckets)
            parts.append(out)
        merged = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        out = self.output(merged.transpose(1, 2).flatten(2))
        return self.output_dropout(out), buckets

    def _split(self, x: Tensor) -> Tensor:
        """[B, T, H * D] -> [B, H, T, D]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _dropout_p(self) -> float:
        return self.config.attention_dropout if self.training else 0.0

    def _local(self, q: Tensor, keys: Tensor | None, v: Tensor, info: SequenceInfo) -> Tensor:
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
            dropout_p=self._dropout_p(),
            mask_BT=info.mask,
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
        self, shared: Tensor, v: Tensor, info: SequenceInfo, buckets: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        config = self.config
        # The first positions attend to everything before them, whatever the length: a rule by position keeps the
        # model exactly causal, one by length (the peers') would not.
        full = min(config.full_attention_threshold, shared.shape[2])
        rotated = self._rotate(shared, info)
        head = None
        if full:
            head = shared_qk_attention(
                rotated[:, :, :full],
                v[:, :, :full],
                key_norm=config.key_norm,
                num_shifted_heads=self.shifted_heads,
                dropout_p=self._dropout_p(),
            )
            if full == shared.shape[2]:
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
            dropout_p=self._dropout_p(),
        )
        return (out if head is None else torch.cat((head, out[:, :, full:]), dim=2)), buckets

    def _lsh_chunked(
        self, shared: Tensor, v: Tensor, info: SequenceInfo, buckets: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        config = self.config
        tokens = shared.shape[2]
        if tokens <= config.full_attention_threshold:
            out = shared_qk_attention(
                shared,
                v,
                key_norm=config.key_norm,
                num_shifted_heads=self.shifted_heads,
                dropout_p=self._dropout_p(),
                mask_BT=info.mask,
            )
            return out, None
        # reformer-pytorch's rule: as many buckets as the current length has chunks.
        num_buckets = config.num_buckets or max(2, 2 * -(-tokens // (2 * config.bucket_size)))
        buckets = self._hash(shared, num_buckets, info, buckets)
        out = chunked_lsh_attention(
            self._rotate(shared, info),
            v,
            buckets,
            chunk_size=config.bucket_size,
            key_norm=config.key_norm,
            attend_across_buckets=config.attend_across_buckets,
            num_shifted_heads=self.shifted_heads,
            dropout_p=self._dropout_p(),
            mask_BT=info.mask,
        )
        return out, buckets


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
