"""From files of text to windows of tokens: readers, memory-mapped shards, windows.

It knows nothing of the model.
"""

from __future__ import annotations

from reformer_lm.corpus.readers import SourceFile, fingerprint_source, read_articles
from reformer_lm.corpus.shards import ShardIndex, build_shards, load_shards, read_index
from reformer_lm.corpus.stream import TokenStream
from reformer_lm.corpus.windows import EvaluationWindows, TokenWindows, window_order

__all__ = [
    "EvaluationWindows",
    "ShardIndex",
    "SourceFile",
    "TokenStream",
    "TokenWindows",
    "build_shards",
    "fingerprint_source",
    "load_shards",
    "read_articles",
    "read_index",
    "window_order",
]
