"""The fast encoder gives what the tokenizer gives, whatever stands beside what."""

from __future__ import annotations

import hashlib
import sys
import unicodedata
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from reformer_lm.text import ArticleEncoder, UnknownCounter, encode_article, encoder, normalize_text
from reformer_lm.text.encoder import composes

# Tokenizers are constants, so that sharing them between examples is sound.
PROPERTY = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

CHINESE = [
    *"你好中国人今天气很我们去公园，。！？：“”…—·《》、（）",
    "㐱",
    "龘",
    "𠀀",
    "か",
    "Ａ",
    "ｂ",
    "①",
    "\ue000",
    "豈",
]
LATIN = [
    *"abcxyzABC019",
    "hello",
    "Hello",
    "3.14",
    "C#",
    "##",
    "###a",
    "[SEP]",
    "[MASK]",
    "[cls]",
    "a" * 99,
    "İ",
    "ß",
    "é",
    "É",
]
BLANKS = [
    " ",
    "  ",
    "\t",
    "\u3000",
    "\u00a0",
    "\n",
    "\n\n",
    "\r\n",
    "\r",
    "\u2028",
    "\x0b",
    "\x85",
    "\u200b",
    "\ufeff",
    "\x00",
]
STRANGE = [
    "e\u0301",
    "\u0301",
    "\u3099",
    "α",
    "Σ",
    "😀",
    "👍🏽",
    "\u1100\u1161\u11a8",
    "\u1161",
    "가",
    "\u212a",
    "\u212b",
    "▁",
    "ﬁ",
    "\u0e33",
]
SURROGATES = ["\ud800", "\udfff"]


def texts(*pools: list[str]) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from([fragment for pool in pools for fragment in pool]), max_size=30).map("".join)


def split(tokens: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    return [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]


def expected_hash(tokenizer: PreTrainedTokenizerFast, article: str) -> int:
    bare = "".join(normalize_text(tokenizer, article).split())
    return int.from_bytes(hashlib.blake2b(bare.encode("utf-32-le"), digest_size=8).digest(), "little")


ENCODERS: dict[int, ArticleEncoder] = {}


def assert_same(tokenizer: PreTrainedTokenizerFast, articles: list[str]) -> None:
    # One encoder for all examples, so that what it remembers is tested, too.
    fast = ENCODERS.setdefault(id(tokenizer), ArticleEncoder(tokenizer))
    encoded = fast.encode(articles)
    assert split(encoded.tokens, encoded.lengths) == [encode_article(tokenizer, article) for article in articles]
    assert encoded.hashes.tolist() == [expected_hash(tokenizer, article) for article in articles]
    counter = UnknownCounter(tokenizer)
    for number, article in enumerate(articles):
        counter.add(article, encode_article(tokenizer, article))
        assert all(owner < len(articles) for owner in encoded.unknown_articles)
        of_this = encoded.unknown_characters[encoded.unknown_articles == number].tolist()
        assert set(map(chr, of_this)) <= set(normalize_text(tokenizer, article))
    if type(tokenizer.backend_tokenizer.model).__name__ == "WordPiece":
        assert Counter(map(chr, encoded.unknown_characters.tolist())) == counter.characters


@PROPERTY
@given(articles=st.lists(texts(CHINESE, LATIN, BLANKS), min_size=1, max_size=5))
@example(articles=["", "", "\n"])
@example(articles=["第1章 hello,world ！ a b　c\r\n\r\n x", " 前后 "])
@example(articles=["a" * 250 + "中" + "b" * 101])
def test_usual_texts(tokenizer: PreTrainedTokenizerFast, articles: list[str]) -> None:
    assert_same(tokenizer, articles)


@PROPERTY
@given(articles=st.lists(texts(CHINESE, LATIN, BLANKS, STRANGE, SURROGATES), min_size=1, max_size=5))
@example(articles=["か\u3099く\n中\u0301文", "가\u11a8", "中 \u0301", "\ud83d\ude00"])
def test_strange_texts(tokenizer: PreTrainedTokenizerFast, articles: list[str]) -> None:
    assert_same(tokenizer, articles)


@PROPERTY
@given(article=st.text(max_size=40))
def test_any_text(tokenizer: PreTrainedTokenizerFast, article: str) -> None:
    assert_same(tokenizer, [article, "中" + article + "文"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(articles=st.lists(texts(CHINESE, LATIN, BLANKS, ["\n"] * 20), min_size=1, max_size=6), size=st.integers(1, 30))
def test_long_articles_are_cut_at_newlines(
    default_tokenizer: PreTrainedTokenizerFast, articles: list[str], size: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "PIECE_CHARACTERS", size)
        assert_same(default_tokenizer, articles)


def test_no_articles(default_tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = ArticleEncoder(default_tokenizer).encode([])
    assert [len(getattr(encoded, name)) for name in ("tokens", "lengths", "hashes", "unknown_articles")] == [0] * 4


def test_nearly_all_characters_of_a_chinese_text_are_looked_up(default_tokenizer: PreTrainedTokenizerFast) -> None:
    fast = ArticleEncoder(default_tokenizer)
    text = "清晨的车站，人来人往。“你好！”他说：《红楼梦》……\n" * 3
    ids = fast._table.look_up(np.array([ord(character) for character in text]))
    assert (ids >= 0).all()


def test_what_composes_with_the_character_before_it_is_known() -> None:
    """All of Unicode, as Python knows it: no character outside `composes` joins or passes the one before it."""
    missed = []
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        if unicodedata.combining(character) and not composes(character):
            missed.append(character)
        parts = unicodedata.decomposition(character).split()
        if len(parts) == 2 and not parts[0].startswith("<") and not composes(chr(int(parts[1], 16))):
            missed.append(character)
    # Hangul is composed by rule, not by table: 1161-1175 and 11A8-11C2.
    assert not missed
    assert all(composes(chr(code)) for code in (0x1161, 0x1175, 0x11A8, 0x11C2))


def test_articles_differ_in_more_than_white_space_to_differ_in_hash(default_tokenizer: PreTrainedTokenizerFast) -> None:
    same = ["春 天\n来了。A b", "春天来了。a B", "　春天\r\n来了。 ab\u200b", "\ufeff春天来了。\n\nAB"]
    other = ["春天来了.ab", "春天来了。", "来了。春天ab"]
    hashes = ArticleEncoder(default_tokenizer).encode([*same, *other]).hashes.tolist()
    assert len(set(hashes[:4])) == 1
    assert len(set(hashes)) == 4


def test_token_ids_get_beginning_and_end_once(default_tokenizer: PreTrainedTokenizerFast) -> None:
    text = "春天来了。\nhello 3"
    whole = np.array(encode_article(default_tokenizer, text))
    encoded = ArticleEncoder(default_tokenizer).encode_ids([whole, whole[1:], whole[:-1], whole[1:-1]])
    assert split(encoded.tokens, encoded.lengths) == [whole.tolist()] * 4
    assert set(encoded.hashes.tolist()) == {expected_hash(default_tokenizer, text)}
