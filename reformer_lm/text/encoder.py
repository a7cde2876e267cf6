"""Encode articles many thousand characters at a time: the tokenizer's ids exactly, many times as fast.

Most characters of Chinese text become the same token whatever stands beside them. For those a table of all code points
replaces the tokenizer, and numpy looks up many thousands at a time. Only what depends on its neighbours, such as
letters, digits and spaces, goes through the tokenizer: each run of it by itself, cut off at characters that do not.

Why the cuts change nothing (`backend.py` lists the steps of normalization): all of them look at runs of *spaced*
characters, at spaces, and at marks that compose with the character before them. A character of the table is none of
these and stays what it is, so nothing reaches across it; and nothing reaches across a newline. Lines with a mark that
composes are given to the tokenizer whole. The table itself is learned from the tokenizer, character by character.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from reformer_lm.text.conventions import NEWLINE
from reformer_lm.text.tokenizer import encode_articles, normalize_text, replace_lone_surrogates

# Looked up at a time: as many as the processor's caches hold with all that is computed of them. Longer texts are cut at
# newlines, which also bounds memory.
PIECE_CHARACTERS = 1 << 16
# Short runs come again and again ("2023", ", "); they are remembered.
REMEMBERED_LENGTH = 16
REMEMBERED_RUNS = 200_000

_UNSEEN, _DEPENDS, _COMPOSES = -1, -2, -3
_NEWLINE_CODE = ord("\n")
_FIRST_BEYOND_ASCII = 0x80


@dataclass(frozen=True)
class EncodedArticles:
    """What became of some articles.

    Attributes:
        tokens: int32 [all tokens], the articles one behind another, each with its beginning and end.
        lengths: int64 [articles], tokens of each.
        hashes: uint64 [articles]. Two articles have the same exactly if their texts are the same once the tokenizer has
            normalized them and white space is gone (up to accidents: 64 bits of BLAKE2).
        unknown_articles: int64 [unknown characters], number of the article each stands in.
        unknown_characters: uint32 [unknown characters], their code points.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray
    unknown_articles: np.ndarray
    unknown_characters: np.ndarray


@dataclass(frozen=True)
class _Run:
    """A run of characters that depend on each other: its ids, its normalized code points, those unknown."""

    ids: list[int]
    characters: list[int]
    unknown: list[int]


@dataclass(frozen=True)
class _Lines:
    """Some texts: ids and code points without white space, lengths [texts], unknown characters and whose."""

    ids: np.ndarray
    id_counts: np.ndarray
    characters: np.ndarray
    character_counts: np.ndarray
    unknown_texts: np.ndarray
    unknown_characters: np.ndarray


class ArticleEncoder:
    """Encodes articles as `encode_articles` does; the property tests compare the two.

    Args:
        tokenizer: From `load_tokenizer`. With other models than WordPiece every line goes through it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._table = _CharacterTable(tokenizer)
        self._known = {token for token in tokenizer.get_vocab() if len(token) == 1} | {" ", "\n"}
        self._runs: dict[str, _Run] = {}

    def encode(self, articles: Sequence[str]) -> EncodedArticles:
        """Encode articles.

        Args:
            articles: The texts.
        """
        pieces: list[str] = []
        owners: list[int] = []
        for number, article in enumerate(articles):
            for piece in _cut_at_newlines(_with_plain_newlines(article)):
                pieces.append(piece)
                owners.append(number)
        ids, counts, unknown_texts, unknown = [], [], [], []
        digests = [hashlib.blake2b(digest_size=8) for _ in articles]
        for first, last in _batches(pieces):
            lines = self._encode_lines(pieces[first:last])
            ids.append(lines.ids)
            counts.append(lines.id_counts)
            unknown_texts.append(lines.unknown_texts + first)
            unknown.append(lines.unknown_characters)
            stops = np.cumsum(lines.character_counts)
            data = memoryview(lines.characters.astype("<u4").tobytes())
            starts = stops - lines.character_counts
            for owner, start, stop in zip(owners[first:last], starts.tolist(), stops.tolist(), strict=True):
                digests[owner].update(data[4 * start : 4 * stop])
        hashes = np.array([int.from_bytes(digest.digest(), "little") for digest in digests], dtype=np.uint64)
        owner_of = np.array(owners, dtype=np.int64)
        tokens, lengths = self._assembled(_joined(ids, np.int32), _joined(counts, np.int64), owner_of, len(articles))
        unknown_articles = owner_of[_joined(unknown_texts, np.int64)]
        return EncodedArticles(tokens, lengths, hashes, unknown_articles, _joined(unknown, np.uint32))

    def encode_ids(self, articles: Sequence[np.ndarray]) -> EncodedArticles:
        """As `encode`, of articles that are token ids: beginning and end are added where they are missing.

        Args:
            articles: int64 [tokens] each, all below the size of the vocabulary. Their hashes are those of the texts
                that the ids stand for, which differ from the original's where that had unknown characters.
        """
        begin, end = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        tokens: list[np.ndarray] = []
        hashes = []
        for article in articles:
            body = bare_ids(article, begin, end)
            tokens.append(np.concatenate([[begin], body, [end]]).astype(np.int32))
            text = self._tokenizer.backend_tokenizer.decode(body.tolist(), skip_special_tokens=False)
            codes = "".join(text.split()).encode("utf-32-le", "surrogatepass")
            hashes.append(int.from_bytes(hashlib.blake2b(codes, digest_size=8).digest(), "little"))
        lengths = np.array([len(ids) for ids in tokens], dtype=np.int64)
        nothing = np.empty(0, dtype=np.int64)
        return EncodedArticles(
            _joined(tokens, np.int32), lengths, np.array(hashes, np.uint64), nothing, nothing.astype(np.uint32)
        )

    def _assembled(
        self, ids: np.ndarray, counts: np.ndarray, owners: np.ndarray, num_articles: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Join the pieces of each article by newlines, and put beginnings and ends around it."""
        # Before each piece stands one token: the beginning of its article, or the newline it was cut at.
        is_first = np.diff(owners, prepend=-1) > 0
        lengths = np.bincount(owners, weights=counts + 1, minlength=num_articles).astype(np.int64) + 1
        # Position of each piece's first own token: after all before it, with one token for each piece and each end.
        begins = np.cumsum(counts) - counts + np.arange(len(counts)) + 1 + owners
        tokens = np.empty(int(lengths.sum()), dtype=np.int32)
        tokens[begins - 1] = np.where(is_first, self._tokenizer.bos_token_id, self._table.newline_id)
        tokens[np.cumsum(lengths) - 1] = self._tokenizer.eos_token_id
        tokens[np.arange(len(ids)) + np.repeat(begins - (np.cumsum(counts) - counts), counts)] = ids
        return tokens, lengths

    def _encode_lines(self, texts: Sequence[str]) -> _Lines:
        """Encode texts that begin and end at newlines."""
        joined = "\n".join(texts)
        codes = np.frombuffer(joined.encode("utf-32-le"), dtype="<u4")
        stops = np.cumsum([len(text) + 1 for text in texts]) - 1
        ids = self._table.look_up(codes)
        depends = self._dependent(codes, ids)
        edges = np.flatnonzero(np.diff(depends, prepend=False, append=False))
        starts, ends = edges[::2], edges[1::2]
        names = [joined[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
        known = self._encode_runs(names)
        runs = [known[name] for name in names]

        is_single = ~depends
        # The newlines between the texts are nobody's.
        is_single[stops[:-1]] = False
        all_ids, id_stops = _spliced(ids, is_single, starts, [run.ids for run in runs])
        characters, character_stops = _spliced(
            self._table.normalized[codes],
            is_single & (codes != _NEWLINE_CODE),
            starts,
            [run.characters for run in runs],
        )
        unknown_at = np.flatnonzero(is_single & (ids == self._tokenizer.unk_token_id))
        strange = [(start, run.unknown) for start, run in zip(starts.tolist(), runs, strict=True) if run.unknown]
        positions = np.concatenate([unknown_at, *(np.full(len(some), start) for start, some in strange)])
        unknown = np.concatenate([self._table.normalized[codes[unknown_at]], *(some for _, some in strange)])
        return _Lines(
            ids=all_ids,
            id_counts=np.diff(id_stops[stops], prepend=0),
            characters=characters,
            character_counts=np.diff(character_stops[stops], prepend=0),
            unknown_texts=np.searchsorted(stops, positions, side="right"),
            unknown_characters=unknown.astype(np.uint32),
        )

    @staticmethod
    def _dependent(codes: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Which characters go through the tokenizer: bool, as long as the codes."""
        depends = ids < 0
        composing = np.flatnonzero(ids == _COMPOSES)
        if len(composing):
            newlines = np.flatnonzero(codes == _NEWLINE_CODE)
            for line in np.unique(np.searchsorted(newlines, composing)).tolist():
                start = int(newlines[line - 1]) + 1 if line else 0
                depends[start : int(newlines[line]) if line < len(newlines) else len(codes)] = True
        return depends

    def _encode_runs(self, names: Sequence[str]) -> dict[str, _Run]:
        """Encode each different run once."""
        if len(self._runs) > REMEMBERED_RUNS:
            self._runs.clear()
        runs = {}
        missing = []
        for name in dict.fromkeys(names):
            if name in self._runs:
                runs[name] = self._runs[name]
            else:
                missing.append(name)
        unknown_id = self._tokenizer.unk_token_id
        for name, ids in zip(missing, encode_articles(self._tokenizer, missing), strict=True):
            ids = ids[1:-1]
            characters = "".join(normalize_text(self._tokenizer, name).split())
            unknown = [ord(c) for c in characters if c not in self._known] if unknown_id in ids else []
            runs[name] = _Run(ids, [ord(character) for character in characters], unknown)
            if len(name) <= REMEMBERED_LENGTH:
                self._runs[name] = runs[name]
        return runs


class _CharacterTable:
    """What becomes of each code point, as far as its neighbours do not matter."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._has_singles = type(tokenizer.backend_tokenizer.model).__name__ == "WordPiece"
        self.newline_id = int(tokenizer.convert_tokens_to_ids(NEWLINE))
        self._ids = np.full(0x110000, _UNSEEN, dtype=np.int32)
        self._ids[:_FIRST_BEYOND_ASCII] = _DEPENDS
        self._ids[_NEWLINE_CODE] = self.newline_id
        # uint32 [code points]: the one that normalization makes of it.
        self.normalized = np.zeros(0x110000, dtype=np.uint32)

    def look_up(self, codes: np.ndarray) -> np.ndarray:
        """The token of each character, negative where its neighbours matter: int32, as long as the codes."""
        found = self._ids[codes]
        unseen = codes[found == _UNSEEN]
        if len(unseen):
            self._learn(np.unique(unseen).tolist())
            found = self._ids[codes]
        return found

    def _learn(self, codes: list[int]) -> None:
        """Ask the tokenizer for characters: twice each, so that it shows whether they are two tokens."""
        if not self._has_singles:
            self._ids[codes] = _DEPENDS
            return
        doubled = encode_articles(self._tokenizer, [2 * chr(code) for code in codes])
        for code, (_, *ids, _) in zip(codes, doubled, strict=True):
            if composes(chr(code)):
                self._ids[code] = _COMPOSES
                continue
            # A space between two that are *spaced* would stay.
            normalized = normalize_text(self._tokenizer, f"{chr(code)} {chr(code)}")
            is_single = (
                len(ids) == 2
                and ids[0] == ids[1]
                and len(normalized) == 2
                and normalized[0] == normalized[1]
                and ord(normalized[0]) >= _FIRST_BEYOND_ASCII
                and not composes(normalized[0])
                and unicodedata.category(normalized[0])[0] != "Z"
            )
            self._ids[code] = ids[0] if is_single else _DEPENDS
            self.normalized[code] = ord(normalized[0]) if is_single else 0


def composes(character: str) -> bool:
    """Whether a character may join the one before it: marks, the later parts of hangul, what Unicode may yet add."""
    code = ord(character)
    category = unicodedata.category(character)
    return category[0] == "M" or category == "Cn" or 0x1161 <= code <= 0x1175 or 0x11A8 <= code <= 0x11C2


def bare_ids(ids: np.ndarray, begin: int, end: int) -> np.ndarray:
    """Token ids without the beginning and the end, where they have them."""
    first = 1 if len(ids) and ids[0] == begin else 0
    last = len(ids) - 1 if len(ids) > first and ids[-1] == end else len(ids)
    return ids[first:last]


def _with_plain_newlines(text: str) -> str:
    """The first step of normalization, as far as it joins two characters; and no halves of surrogate pairs."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return replace_lone_surrogates(text)
    return text


def _cut_at_newlines(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        stop = text.rfind("\n", start, start + PIECE_CHARACTERS)
        if stop < 0:
            stop = text.find("\n", start + PIECE_CHARACTERS)
        if stop < 0:
            break
        yield text[start:stop]
        start = stop + 1
    yield text[start:]


def _batches(pieces: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Ranges of pieces that are worked on together."""
    first = characters = 0
    for number, piece in enumerate(pieces):
        characters += len(piece)
        if characters >= PIECE_CHARACTERS:
            yield first, number + 1
            first, characters = number + 1, 0
    if first < len(pieces):
        yield first, len(pieces)


def _joined(arrays: Sequence[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype, copy=False)


def _spliced(
    values: np.ndarray, is_single: np.ndarray, starts: np.ndarray, runs: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Put the runs' results between those of single characters.

    Args:
        values: [characters], of the single ones.
        is_single: bool [characters].
        starts: [runs], where each begins.
        runs: Its results.

    Returns:
        The results in order, and int64 [characters + 1]: how many there are before each character.
    """
    counts = is_single.astype(np.int64)
    lengths = np.fromiter(map(len, runs), dtype=np.int64, count=len(runs))
    counts[starts] = lengths
    stops = np.concatenate([[0], np.cumsum(counts)])
    spliced = np.empty(int(stops[-1]), dtype=values.dtype)
    spliced[stops[:-1][is_single]] = values[is_single]
    if len(runs):
        flat = np.fromiter((value for run in runs for value in run), dtype=values.dtype, count=int(lengths.sum()))
        own_starts = np.cumsum(lengths) - lengths
        spliced[np.arange(len(flat)) + np.repeat(stops[starts] - own_starts, lengths)] = flat
    return spliced, stops
