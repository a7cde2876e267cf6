"""From files of text to windows of tokens: readers, memory-mapped shards, windows.

It knows nothing of the model.
"""

from __future__ import annotations

from reformer_lm.corpus.article_windows import ArticleWindows
from reformer_lm.corpus.index import ShardIndex, read_index
from reformer_lm.corpus.leakage import Leaks, find_leaks
from reformer_lm.corpus.readers import Reading, read_articles
from reformer_lm.corpus.shards import build_shards, load_shards
from reformer_lm.corpus.sources import CorpusSource, SourceFile, find_files, fingerprint_source
from reformer_lm.corpus.stream import TokenStream
from reformer_lm.corpus.tokenising import choose_workers
from reformer_lm.corpus.windows import EvaluationWindows, TokenWindows, window_order

__all__ = [
    "ArticleWindows",
    "CorpusSource",
    "EvaluationWindows",
    "Leaks",
    "Reading",
    "ShardIndex",
    "SourceFile",
    "TokenStream",
    "TokenWindows",
    "build_shards",
    "choose_workers",
    "find_files",
    "find_leaks",
    "fingerprint_source",
    "load_shards",
    "read_articles",
    "read_index",
    "window_order",
]
