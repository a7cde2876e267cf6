"""Vocabularies from a corpus: characters with WordPiece, words segmented by jieba, BPE."""

from __future__ import annotations

import importlib
import json
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from math import log

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from reformer_lm.errors import InputError
from reformer_lm.text.backend import bpe_backend, build_normalizer, marked_pre_tokenizer, word_backend
from reformer_lm.text.characters import marked_base, wordpiece_base
from reformer_lm.text.conventions import (
    ASCII_CHARACTERS,
    CONTINUATION,
    NEWLINE,
    SPACE_MARK,
    SPECIAL_TOKENS,
    UNKNOWN,
)
from reformer_lm.text.tokenizer import replace_lone_surrogates

# A word of ASCII letters with its space mark, a run of other letters, or one other character.
_PIECES = re.compile(rf"{SPACE_MARK}?[A-Za-z]+|[^\W\d_A-Za-z]+|{SPACE_MARK}?.")
_NOT_FOR_JIEBA = re.compile(rf"{SPACE_MARK}|[\x00-\x7f]|.\Z")
_LATIN_WORD = re.compile("[A-Za-z]{2,}")


def learn_characters(
    articles: Iterable[str], *, vocab_size: int | None = None, min_frequency: int = 1, keep_case: bool = False
) -> list[str]:
    """Learns a character vocabulary, with pieces of Latin words if `vocab_size` leaves room for them.

    Args:
        articles: texts; read once.
        vocab_size: the most tokens to have; None for every frequent character and no pieces of words.
        min_frequency: how often a character or a piece must occur.
        keep_case: count capital letters apart.

    Returns:
        The lines of a vocab.txt: special tokens, ASCII, symbols, characters by falling frequency, pieces.

    Raises:
        InputError: the corpus has no text, or `vocab_size` is too small.
    """
    base = wordpiece_base()
    normalizer = build_normalizer(ASCII_CHARACTERS, keep_case=keep_case, mark_spaces=False)
    characters: Counter[str] = Counter()
    words: Counter[str] = Counter()
    for line in _normalized_lines(articles, normalizer):
        characters.update(line)
        words.update(_LATIN_WORD.findall(line))
    vocabulary = base + _frequent_characters(characters, base, vocab_size, min_frequency)
    if vocab_size is not None and words:
        vocabulary += _latin_pieces(words, vocab_size, min_frequency)[: vocab_size - len(vocabulary)]
    return vocabulary


def learn_words(
    articles: Iterable[str], *, vocab_size: int = 30_000, min_frequency: int = 2, keep_case: bool = False
) -> Tokenizer:
    """Learns a word-level tokenizer: frequent words of jieba's segmentation, and characters to fall back on.

    Args:
        articles: texts; read once.
        vocab_size: the most tokens to have. Characters come first, words take the rest.
        min_frequency: how often a character or a word must occur.
        keep_case: count capital letters apart.

    Returns:
        A backend (`backend.word_backend`) that needs no jieba.

    Raises:
        InputError: jieba is not installed, the corpus has no text, or `vocab_size` is too small.
    """
    cut = _jieba_cut()
    base = marked_base()
    normalizer = build_normalizer(ASCII_CHARACTERS, keep_case=keep_case, mark_spaces=True)
    characters: Counter[str] = Counter()
    words: Counter[str] = Counter()
    for line in _normalized_lines(articles, normalizer):
        characters.update(line)
        for piece in _PIECES.findall(line):
            words.update([piece] if _NOT_FOR_JIEBA.match(piece) else cut(piece))
    vocabulary = base + _frequent_characters(characters, base, vocab_size, min_frequency)
    known = set(vocabulary)
    for word, count in _by_frequency(words):
        if len(vocabulary) == vocab_size or count < min_frequency:
            break
        # A piece such as "▁," stays two tokens: only letters make words.
        letters = word.removeprefix(SPACE_MARK)
        if word not in known and letters.isalpha() and known.issuperset(word):
            vocabulary.append(word)
    total = words.total()

    def log_probability(piece: str) -> float:
        # Half an occurrence for what never stood alone: likelier than [UNK], rarer than what did.
        return 0.0 if piece == NEWLINE else log(max(words[piece], 0.5) / total)

    return word_backend([(piece, log_probability(piece)) for piece in vocabulary], keep_case=keep_case)


def learn_bpe(
    articles: Iterable[str], *, vocab_size: int = 16_000, min_frequency: int = 2, keep_case: bool = False
) -> Tokenizer:
    """Learns a BPE tokenizer with the `tokenizers` library.

    Args:
        articles: texts; read twice, so that an iterator will not do.
        vocab_size: the most tokens to have. Characters come first, merges take the rest.
        min_frequency: how often a character or a merged pair must occur.
        keep_case: count capital letters apart.

    Returns:
        A backend (`backend.bpe_backend`).

    Raises:
        InputError: the corpus has no text, or `vocab_size` is too small.
    """
    base = marked_base()
    normalizer = build_normalizer(ASCII_CHARACTERS, keep_case=keep_case, mark_spaces=True)
    characters: Counter[str] = Counter()
    for line in _normalized_lines(articles, normalizer):
        characters.update(line)
    alphabet = [
        *(piece for piece in base if len(piece) == 1),
        *_frequent_characters(characters, base, vocab_size, min_frequency),
    ]
    learner = Tokenizer(models.BPE(unk_token=UNKNOWN))
    learner.normalizer = normalizer
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        # Newlines are no text to merge.
        [pre_tokenizers.Split(NEWLINE, "removed"), marked_pre_tokenizer(alphabet)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    learner.train_from_iterator((replace_lone_surrogates(article) for article in articles), trainer)
    learned = json.loads(learner.to_str())["model"]
    merges = [(left, right) for left, right in learned["merges"]]
    return bpe_backend(learned["vocab"], merges, keep_case=keep_case)


def _normalized_lines(articles: Iterable[str], normalizer: normalizers.Normalizer) -> Iterator[str]:
    for article in articles:
        normalized: str = normalizer.normalize_str(replace_lone_surrogates(article))
        yield from normalized.split(NEWLINE)


def _by_frequency(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _frequent_characters(
    counts: Counter[str], base: list[str], vocab_size: int | None, min_frequency: int
) -> list[str]:
    if not counts:
        raise InputError("the corpus holds no text to learn a vocabulary from")
    if vocab_size is not None and vocab_size <= len(base):
        raise InputError(
            f"vocab_size {vocab_size} is too small: special tokens, ASCII and punctuation take {len(base)}; "
            "give more than that"
        )
    known = {*base, " "}
    frequent = [c for c, count in _by_frequency(counts) if c not in known and count >= min_frequency]
    return frequent if vocab_size is None else frequent[: vocab_size - len(base)]


def _latin_pieces(words: Counter[str], vocab_size: int, min_frequency: int) -> list[str]:
    """The pieces of more than one letter, in the order in which WordPiece learns them."""
    learner = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "removed")
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        # Given ids now, or they would get them in the random order of a hash map, and so would ties.
        special_tokens=[f"{CONTINUATION}{letter}" for letter in string.ascii_letters],
        initial_alphabet=list(string.ascii_letters),
        continuing_subword_prefix=CONTINUATION,
        show_progress=False,
    )
    learner.train_from_iterator((" ".join([word] * count) for word, count in _by_frequency(words)), trainer)
    pieces = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    return [piece for piece, _ in pieces if len(piece.removeprefix(CONTINUATION)) > 1]


def _jieba_cut() -> Callable[[str], Iterable[str]]:
    try:
        with warnings.catch_warnings():
            # jieba's sources hold invalid escape sequences, and it imports pkg_resources.
            warnings.simplefilter("ignore")
            jieba = importlib.import_module("jieba")
    except ImportError as error:
        raise InputError("word level (--segment) needs jieba: pip install jieba") from error
    # Its loading messages would go to stderr.
    jieba.setLogLevel("WARNING")
    cut: Callable[[str], Iterable[str]] = jieba.cut
    return cut
