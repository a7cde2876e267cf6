"""How evenly LSH attention fills its buckets: what a model that learns well does, and one that collapses does not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from reformer_lm import AttentionRecord, record_attention
from reformer_lm.heads.vocabulary import ReformerLMVocabularyHead

# Tokens in a bucket, and how many buckets hold so many.
BucketSizes = dict[int, int]


@contextlib.contextmanager
def record_bucket_sizes(model: nn.Module) -> Iterator[dict[int, BucketSizes]]:
    """Watches a forward pass that happens anyway, and counts how full the buckets of its first row became.

    Nothing is computed twice and no attention weights are formed: what it costs is sorting the buckets of one pass.

    Args:
        model: Any model, wrapped or not.

    Yields:
        A dictionary, filled when the context ends: by layer, how many buckets (of all heads and rounds) hold how many
        tokens. Layers that hash nothing are missing.
    """
    sizes: dict[int, BucketSizes] = {}
    with contextlib.ExitStack() as stack:
        try:
            records = stack.enter_context(record_attention(model, max_weights_tokens=0))
        except ValueError:
            # Another kind of model, which has no buckets.
            records = []
        yield sizes
    configs = [module.config for module in model.modules() if isinstance(module, ReformerLMVocabularyHead)]
    for record in records:
        if record.buckets is not None:
            sizes[record.layer_index] = bucket_sizes(record, configs[0].buckets_per_round if configs else None)


def bucket_sizes(record: AttentionRecord, num_buckets: int | None) -> BucketSizes:
    """How many buckets hold how many tokens, over all heads and rounds of a record's first row.

    Args:
        record: Of one layer, with buckets.
        num_buckets: Of a round; None where it follows the length (``lsh_mask="chunked"``): then up to the last one
            that holds a token.
    """
    assert record.buckets is not None
    # Of every head and round one line of buckets.
    rounds_NT: Tensor = record.buckets[0].flatten(0, 1)
    count = num_buckets or int(rounds_NT.max()) + 1
    lines = torch.arange(rounds_NT.shape[0], device=rounds_NT.device).unsqueeze(1) * count
    tokens = torch.bincount((rounds_NT + lines).flatten(), minlength=rounds_NT.shape[0] * count)
    held, buckets = torch.unique(tokens, return_counts=True)
    return dict(zip(held.tolist(), buckets.tolist(), strict=True))
