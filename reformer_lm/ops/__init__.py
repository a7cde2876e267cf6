"""Pure tensor functions: no modules, no state, no configuration objects.

Shape suffixes in names: B batch, H heads, R hash rounds, T tokens, D head dimension, W window.
"""

from reformer_lm.ops.hashing import SortedBuckets, hash_vectors, sample_rotations, sort_by_bucket
from reformer_lm.ops.local import local_attention
from reformer_lm.ops.lsh import lsh_attention
from reformer_lm.ops.lsh_chunked import chunked_lsh_attention
from reformer_lm.ops.shared_qk import shared_qk_attention

__all__ = [
    "SortedBuckets",
    "chunked_lsh_attention",
    "hash_vectors",
    "local_attention",
    "lsh_attention",
    "sample_rotations",
    "shared_qk_attention",
    "sort_by_bucket",
]
