"""decode(encode(text)) == normalize(text), for every kind of tokenizer and awkward texts."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from reformer_lm.text import UnknownCounter, normalize_text

# The tokenizer is a constant, so that sharing it between examples is sound.
PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

CHINESE = list("你好中国人今天气很我们去公园，。！？：“”…—·《》、（）")
LATIN = list("abcxyzABC0123456789") + ["hello", "Hello", "world", "3.14", "e.g.", "C#", "self"]
ASCII_MARKS = list("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~") + ["##", "###", "##a", "[SEP]", "[MASK]", "[sep]"]
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
    "\ufeff",
    "\u200b",
    "\x00",
]
# Unknown to some tokenizers, or composing with their neighbours.
STRANGE = [
    "é",
    "e\u0301",
    "\u0301",
    "α",
    "İ",
    "㐱",
    "😀",
    "\u1100",
    "\u1161",
    "\u212b",
    "▁",
    "ﬁ",
    "\ufffd",
    "か\u3099",
]


def texts(*pools: list[str]) -> st.SearchStrategy[str]:
    fragments = [fragment for pool in pools for fragment in pool]
    return st.lists(st.sampled_from(fragments), max_size=40).map("".join)


def assert_round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    normal = normalize_text(tokenizer, text)
    ids = tokenizer.encode(text)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == normal
    assert tokenizer.decode(ids, skip_special_tokens=True) == normal
    assert tokenizer.encode(normal) == ids


@PROPERTY
@given(text=texts(CHINESE, ["\n"]))
def test_chinese_with_newlines_comes_back_unchanged(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert normalize_text(tokenizer, text) == text
    assert_round_trip(tokenizer, text)


@PROPERTY
@given(text=texts(CHINESE, LATIN, ASCII_MARKS, BLANKS))
@example(text="a.b a. b a .b a , b")
@example(text="####a ## ### #### #x ##")
@example(text="[SEP]\n[ SEP ] [MASK][CLS]a[PAD]你[UNK]")
@example(text="\n\n a \n\n")
@example(text="x" * 250 + " " + "#" * 220)
def test_mixed_text_comes_back_normalized(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert_round_trip(tokenizer, text)


@PROPERTY
@given(text=st.text(max_size=60) | texts(CHINESE, LATIN, ASCII_MARKS, BLANKS, STRANGE))
@example(text="x a \u0301 b")
@example(text="\u1100 \u1161")
def test_normalization_is_idempotent(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    normal = normalize_text(tokenizer, text)
    assert normalize_text(tokenizer, normal) == normal


@PROPERTY
@given(text=st.text(max_size=60) | texts(CHINESE, LATIN, STRANGE, BLANKS))
@example(text="hello😀world 㐱㐲你好")
def test_each_unknown_character_costs_one_token(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    known = {token for token in tokenizer.get_vocab() if len(token) == 1} | {" ", "\n"}
    normal = normalize_text(tokenizer, text)
    unknown = [character for character in normal if character not in known]
    ids = tokenizer.encode(text)
    assert ids.count(tokenizer.unk_token_id) == len(unknown)
    # The known rest is not lost: unknown characters stand in its place as [UNK].
    decoded = tokenizer.decode(ids)
    assert decoded == "".join("[UNK]" if character not in known else character for character in normal)
    counter = UnknownCounter(tokenizer)
    counter.add(text, ids)
    assert counter.unknown == counter.characters.total() == len(unknown)


@PROPERTY
@given(text=texts(CHINESE, LATIN, ASCII_MARKS, BLANKS, STRANGE), seed=st.integers(0, 2**16))
def test_decoding_streams(tokenizer: PreTrainedTokenizerFast, text: str, seed: int) -> None:
    """One token more only appends, and a slice from anywhere decodes, for any ids a model may write."""
    generator = random.Random(seed)
    ids = [
        *tokenizer.encode(text),
        *(generator.randrange(len(tokenizer)) for _ in range(10)),
        *tokenizer.encode("a b"),
    ]
    whole = tokenizer.decode(ids)
    previous = ""
    for end in range(len(ids) + 1):
        prefix = tokenizer.decode(ids[:end])
        assert prefix.startswith(previous)
        previous = prefix
    assert previous == whole
    for start in range(len(ids)):
        assert isinstance(tokenizer.decode(ids[start:], skip_special_tokens=True), str)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("你好， world", "你好，world"),
        ("ＡＢＣ：１２", "ａｂｃ：１２"),
        (" 　缩进\t的 段落 \r\n下一行  \n", "缩进的段落\n下一行\n"),
        ("Tabs\tand   runs of spaces", "tabs and runs of spaces"),
        ("a.b, c . d", "a.b, c . d"),
        ("“引号”、《书名》……", "“引号”、《书名》……"),
        ("zero\u200bwidth\ufeff", "zerowidth"),
        ("一\r二\r\n三\u2028四", "一\n二\n三\n四"),
        ("[SEP] [MASK]", "[sep] [mask]"),
        ("=" * 101, "=" * 100 + " ="),
        ("###x ## #", "# # #x ## #"),
        ("e\u0301", "é"),
        ("\ud83d\ude00\ud83d", "😀\ufffd"),
    ],
)
def test_normalization_of_the_default_tokenizer(
    default_tokenizer: PreTrainedTokenizerFast, text: str, normal: str
) -> None:
    assert normalize_text(default_tokenizer, text) == normal


def test_every_character_of_the_default_vocabulary_is_reachable(
    default_tokenizer: PreTrainedTokenizerFast,
) -> None:
    for character in (token for token in default_tokenizer.get_vocab() if len(token) == 1):
        assert_round_trip(default_tokenizer, f"你{character}a b")


def test_no_code_point_breaks_normalization(default_tokenizer: PreTrainedTokenizerFast) -> None:
    """Single characters between the neighbours that they could join or part with."""
    every = [chr(code) for code in range(0x20000) if not 0xD800 <= code < 0xE000]
    for pattern in ("{}", "a {} b", "你{} a", "\u1100 {}"):
        once = normalize_text(default_tokenizer, "\n".join(pattern.format(c) for c in every if c != "\n"))
        assert normalize_text(default_tokenizer, once) == once
