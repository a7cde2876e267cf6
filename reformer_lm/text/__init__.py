"""Text in and out: vocabularies and tokenizers. It knows nothing of the model."""

from __future__ import annotations

from reformer_lm.text.conventions import DEFAULT_VOCABULARY
from reformer_lm.text.encoder import ArticleEncoder, EncodedArticles, bare_ids
from reformer_lm.text.tokenizer import (
    encode_article,
    encode_articles,
    encode_with_masks,
    load_tokenizer,
    locate_tokens,
    mask_token_of,
    normalize_text,
    tokenizer_fingerprint,
)
from reformer_lm.text.unknown import UnknownCounter

__all__ = [
    "DEFAULT_VOCABULARY",
    "ArticleEncoder",
    "EncodedArticles",
    "UnknownCounter",
    "bare_ids",
    "encode_article",
    "encode_articles",
    "encode_with_masks",
    "load_tokenizer",
    "locate_tokens",
    "mask_token_of",
    "normalize_text",
    "tokenizer_fingerprint",
]
