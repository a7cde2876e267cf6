"""Self-attention whose heads are split among local and LSH attention."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from reformer_lm.config import ReformerLMConfig
from reformer_lm.layers.beginnings import BeginningsInFront
from reformer_lm.layers.chunked import attend_in_chunks
from reformer_lm.layers.decoding import attend_from_cache
from reformer_lm.layers.heads import AttentionReplay, HeadGroup, Projections, mask_of_extra, memory_of
from reformer_lm.layers.lending import Borrower
from reformer_lm.layers.linear import Linear, ResidualLinear
from reformer_lm.layers.positions import apply_rotary
from reformer_lm.layers.sequence import SequenceInfo
from reformer_lm.ops.hashing import (
    StackedRotations,
    factorize_buckets,
    hash_next,
    hash_vectors,
    sample_rotations,
    stack_rotations,
)
from reformer_lm.ops.kept_attention import KeptAttention
from reformer_lm.ops.keys import SELF_ATTENTION_BIAS, normalize_keys
from reformer_lm.ops.local import local_attention
from reformer_lm.ops.lsh import lsh_attention
from reformer_lm.ops.shared_qk import shared_qk_attention

# A prime larger than any count of layers or steps, to keep seeds apart.
_SEED_STRIDE = 1_000_000_007


class LSHSelfAttention(Borrower):
    """Multi-head self-attention; the first ``num_local_heads`` heads are local, the others LSH.

    LSH heads share one projection for queries and keys and find far matches; local heads see the last
    ``local_window`` tokens (those of a bidirectional model the next ones, too) and keep short-range order. Source:
    Kitaev et al. 2020, section 2; the local heads follow Roy et al. 2020 (arXiv 2003.05997), section 4.

    Args:
        config: of the model.
        layer_index: which layer's attention this is; it seeds the rotations.
        lender: the attention whose weights this one uses; None for weights of its own.
    """

    lent = ("query_key", "value", "output", "local_key", "memory")
    query_key: Linear
    value: Linear
    output: ResidualLinear
    local_key: Linear
    memory: nn.Parameter | None

    def __init__(self, config: ReformerLMConfig, layer_index: int, lender: LSHSelfAttention | None = None) -> None:
        super().__init__(lender)
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
        self.exact = config.lsh_mask == "causal"
        self.causal = config.causal
        chunks = min(config.attn_chunks, self.heads)
        borders = [self.heads * index // chunks for index in range(chunks + 1)]
        self.groups = [HeadGroup(begin, end) for begin, end in itertools.pairwise(borders)]
        self.output_dropout = nn.Dropout(config.hidden_dropout_prob)
        if lender is None:
            self._make_weights(config)
        # Rotations follow from the seed alone, so they are made on first use and never saved.
        self._rotations: dict[tuple[object, ...], tuple[Tensor, ...]] = {}
        self._stack: tuple[tuple[Tensor, ...], StackedRotations] | None = None

    def _make_weights(self, config: ReformerLMConfig) -> None:
        width = self.heads * self.head_dim
        self.query_key = Linear(config.hidden_size, width, bias=False)
        self.value = Linear(config.hidden_size, self.head_dim if config.one_value_head else width, bias=False)
        self.output = ResidualLinear(width, config.hidden_size, bias=config.attention_output_bias)
        if self.local_heads and config.local_keys == "separate":
            self.local_key = Linear(config.hidden_size, self.local_heads * self.head_dim, bias=False)
        # Learned vectors in the place of hidden states, projected like them. Source: reformer-pytorch's num_mem_kv,
        # after Sukhbaatar et al. 2019 (arXiv 1907.01470), section 4.
        self.memory = None
        if config.num_mem_kv and self.lsh_heads:
            self.memory = nn.Parameter(torch.randn(config.num_mem_kv, config.hidden_size))

    def weights(self) -> Iterator[nn.Parameter]:
        """The parameters that this layer computes with, whoever owns them."""
        return (self if self.lender is None else self.lender[0]).parameters()

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
            factors = self.config.bucket_factors or factorize_buckets(num_buckets)
            fresh = sample_rotations(self.lsh_heads, self.head_dim, self.config.num_hashes, factors, seed)
            # A dictionary of one: a new step or length replaces what the last one used.
            self._rotations = {key: tuple(rotation.to(device) for rotation in fresh)}
        return self._rotations[key]

    def _stacked(self, rotations: tuple[Tensor, ...]) -> StackedRotations:
        """These, made anew only when they change."""
        if self._stack is None or self._stack[0] is not rotations:
            self._stack = (rotations, stack_rotations(rotations))
        return self._stack[1]

    def forward(
        self, x: Tensor, info: SequenceInfo, replays: Sequence[AttentionReplay] | None = None, keep: bool = False
    ) -> tuple[Tensor, Sequence[AttentionReplay]]:
        """Attends, one group of heads after the other (``attn_chunks`` of them).

        Args:
            x: hidden states [B, T, hidden_size].
            info: positions, mask and step.
            replays: from an earlier call on the same input, to be repeated.
            keep: whether to keep what the LSH heads compute, for a replay that costs no LSH attention.

        Returns:
            The output [B, T, hidden_size], and what it takes to repeat the call: one replay per group.
        """
        if info.cache is not None:
            return self.output_dropout(self.output(attend_from_cache(self, x, info))), []
        if replays is None:
            replays = [AttentionReplay(kept=KeptAttention() if keep else None) for _ in self.groups]
        if len(self.groups) == 1:
            out = self.output(self.attend(self.project(x, info), info, replays[0], self._dropout_p()))
            return self.output_dropout(out), replays
        total: Tensor | None = None
        for group, replay in zip(self.groups, replays, strict=True):
            if x.requires_grad:
                # The graph keeps the results of a group's LSH heads, and nothing else of what it computes.
                again = AttentionReplay(replay.buckets, replay.kept or KeptAttention())
                part = checkpoint(self._partial_output, x, info, again, group, use_reentrant=False)
                replay.buckets = again.buckets
            else:
                part = self._partial_output(x, info, replay, group)
            total = part if total is None else total + part
        assert total is not None
        if self.output.bias is not None:
            total = total + self.output.bias
        return self.output_dropout(total), replays

    def _partial_output(self, x: Tensor, info: SequenceInfo, replay: AttentionReplay, group: HeadGroup) -> Tensor:
        """What a group of heads contributes to the output, [B, T, hidden_size], without bias."""
        merged = self.attend(self.project(x, info, group), info, replay, self._dropout_p(), group)
        columns = slice(group.begin * self.head_dim, group.end * self.head_dim)
        return functional.linear(merged, self.output.weight[:, columns])

    def project(self, x: Tensor, info: SequenceInfo, group: HeadGroup | None = None) -> Projections:
        """Queries, keys and values of hidden states [B, T, hidden_size], and of memory and context."""
        group = group or HeadGroup(0, self.heads)
        local, lsh = self._parts(group)
        extra_states = [] if self.memory is None else [self.memory.to(x.dtype).expand(x.shape[0], -1, -1)]
        if info.context is not None and self.lsh_heads:
            extra_states.append(info.context.to(x.dtype))
        extra = None
        if extra_states and lsh.end > lsh.begin:
            # Local heads see neither.
            states = torch.cat(extra_states, dim=1)
            extra = (self._projected(self.query_key, states, lsh), self._projected(self.value, states, lsh))
        separate = local.end > local.begin and self.config.local_keys == "separate"
        local_key = self._projected(self.local_key, x, local) if separate else None
        query_key, value = (self._projected(layer, x, group) for layer in (self.query_key, self.value))
        return Projections(query_key, value, local_key, extra)

    def attend(
        self,
        heads: Projections,
        info: SequenceInfo,
        replay: AttentionReplay,
        dropout_p: float,
        group: HeadGroup | None = None,
    ) -> Tensor:
        """Attention of all heads or a group of them, before the output projection.

        Args:
            heads: from `project`.
            info: see `forward`.
            replay: of these heads; an empty one is filled.
            dropout_p: probability of dropping an attention weight.
            group: the heads, if not all.

        Returns:
            [B, T, H * D_v], heads side by side.
        """
        local, lsh = self._parts(group or HeadGroup(0, self.heads))
        count = local.end - local.begin
        query_key, value, local_key, extra = heads
        parts = []
        if count:
            parts.append(self._local(query_key[:, :count], local_key, value[:, :count], info, dropout_p))
        if lsh.end > lsh.begin:
            shared, v = query_key[:, count:], value[:, count:]
            if self.exact:
                parts.append(self._lsh_causal(shared, v, extra, info, replay, dropout_p, lsh))
            else:
                parts.append(attend_in_chunks(self, shared, v, extra, info, replay, dropout_p, lsh))
        merged = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        return merged.transpose(1, 2).flatten(2)

    def _parts(self, group: HeadGroup) -> tuple[HeadGroup, HeadGroup]:
        """The local and the LSH heads of a group."""
        border = min(max(group.begin, self.local_heads), group.end)
        return HeadGroup(group.begin, border), HeadGroup(border, group.end)

    def _projected(self, layer: nn.Linear, x: Tensor, group: HeadGroup) -> Tensor:
        """What a projection gives the heads of a group: [B, T, hidden_size] -> [B, H, T, D]."""
        if self.config.one_value_head and layer is self.value:
            return self._split(layer(x)).expand(-1, group.size, -1, -1)
        rows = slice(group.begin * self.head_dim, group.end * self.head_dim)
        # As a module where it is used whole, so that whatever wraps it (an adapter, say) takes part.
        whole = rows.start == 0 and rows.stop >= layer.weight.shape[0]
        return self._split(layer(x) if whole else functional.linear(x, layer.weight[rows]))

    def _split(self, x: Tensor) -> Tensor:
        """[B, T, H * D] -> [B, H, T, D]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _dropout_p(self) -> float:
        return self.config.attention_dropout if self.training else 0.0

    def local_queries_and_keys(self, q: Tensor, keys: Tensor | None, info: SequenceInfo) -> tuple[Tensor, Tensor]:
        """Of the local heads, from `Projections`: with keys where they share the queries, and rotated."""
        if keys is None:
            keys = normalize_keys(q, self.config.key_norm)
        if self.config.local_rotary:
            factors = info.rotary(self.head_dim, q.dtype)
            q, keys = apply_rotary(q, factors), apply_rotary(keys, factors)
        return q, keys

    def _local(self, q: Tensor, keys: Tensor | None, v: Tensor, info: SequenceInfo, dropout_p: float) -> Tensor:
        shared = keys is None
        q, keys = self.local_queries_and_keys(q, keys, info)
        return local_attention(
            q,
            keys,
            v,
            window=self.local_window,
            exact_window=self.exact,
            causal=self.causal,
            self_bias=SELF_ATTENTION_BIAS if shared else 0.0,
            dropout_p=dropout_p,
            mask_BT=info.mask,
            documents_BT=info.documents,
        )

    def hash(
        self, shared: Tensor, num_buckets: int, info: SequenceInfo, replay: AttentionReplay, lsh: HeadGroup
    ) -> Tensor:
        """Buckets [B, H, R, T] of a group's shared vectors, as they were if there is anything to repeat."""
        if replay.buckets is None:
            rotations = self.rotations(num_buckets, info.hash_step, shared.device)
            if shared.shape[2] == 1 and lsh.size == self.lsh_heads:
                replay.buckets = hash_next(shared, self._stacked(rotations))
                return replay.buckets
            own = slice(lsh.begin - self.local_heads, lsh.end - self.local_heads)
            replay.buckets = hash_vectors(shared, tuple(rotation[own] for rotation in rotations))
        return replay.buckets

    def shifted_of(self, lsh: HeadGroup) -> int:
        """How many heads of a group read what followed a match: of all heads the last ``shifted_heads``."""
        return max(0, lsh.end - max(lsh.begin, self.heads - self.shifted_heads))

    def rotate(self, shared: Tensor, info: SequenceInfo) -> Tensor:
        """Shared vectors with rotary positions, if the model has them there."""
        # After hashing: a match is one of content, wherever it stands.
        if self.config.position_type != "rotary":
            return shared
        return apply_rotary(shared, info.rotary(self.head_dim, shared.dtype))

    def _lsh_causal(
        self,
        shared: Tensor,
        v: Tensor,
        extra: tuple[Tensor, Tensor] | None,
        info: SequenceInfo,
        replay: AttentionReplay,
        dropout_p: float,
        lsh: HeadGroup,
    ) -> Tensor:
        config = self.config
        # The first positions attend to everything before them, whatever the length: a rule by position keeps the
        # model exactly causal, one by length (the peers') would not.
        rotated = self.rotate(shared, info)
        extra_mask = mask_of_extra(extra, info)
        threshold = config.full_attention_threshold
        begin = BeginningsInFront(shared.shape[2], threshold, info.documents) if threshold else None
        head = None
        if begin is not None:
            head = shared_qk_attention(
                begin.take(rotated),
                begin.take(v),
                key_norm=config.key_norm,
                num_shifted_heads=self.shifted_of(lsh),
                dropout_p=dropout_p,
                documents_BT=begin.documents,
                extra=extra,
                extra_mask_BE=extra_mask,
            )
            if begin.is_all:
                return head
        assert config.buckets_per_round is not None
        buckets = self.hash(shared, config.buckets_per_round, info, replay, lsh)
        out = lsh_attention(
            rotated,
            v,
            buckets,
            window=self.lsh_window,
            key_norm=config.key_norm,
            num_shifted_heads=self.shifted_of(lsh),
            dropout_p=dropout_p,
            allow_duplicates=config.allow_duplicate_attention,
            documents_BT=info.documents,
            memory=memory_of(extra, info.context is not None),
            memory_mask_BM=extra_mask,
            kept=replay.kept,
        )
        return out if begin is None or head is None else begin.replace(out, head)
