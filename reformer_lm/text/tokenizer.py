"""Loading a tokenizer and using it: the one door through which the rest of the package turns text into ids.

A tokenizer here is transformers' `PreTrainedTokenizerFast` around a `tokenizers.Tokenizer` built in
`backend.py`. After `save_pretrained(folder)`, `AutoTokenizer.from_pretrained(folder)` agrees with it in a
process that knows nothing of this package. GPT2-Chinese's conventions: an article is `[MASK] text [CLS]`
(`bos_token`, `eos_token`), a newline is the token [SEP]. [SEP] is text, not a special token: skipping special
tokens while decoding keeps it. `encode` adds no token of its own.

- Text that literally contains "[MASK]" or "[SEP]" is encoded as brackets and letters, never as the special
  token: the saved tokenizer sets `split_special_tokens`, and normalization lower-cases such literals.
- Padding goes to the left, so that a batch of prompts of uneven lengths ends where generation starts.
- `decode` of any slice of ids works, and decoding one token more only ever appends text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from math import log
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from reformer_lm.errors import InputError
from reformer_lm.text.backend import word_backend, wordpiece_backend
from reformer_lm.text.conventions import (
    BEGIN,
    DEFAULT_VOCABULARY,
    END,
    NEWLINE,
    PAD,
    SPACE_MARK,
    SPECIAL_TOKENS,
    UNKNOWN,
)

# Begin and end of a token in its text, in characters.
Span = tuple[int, int]
_SURROGATE = re.compile("[\ud800-\udfff]")

_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_FILE_SUFFIXES = (".txt", ".json", ".vocab")
_BUILD_WORDS = "python -m reformer_lm.text.vocabulary --segment --corpus FILE --output FOLDER"


def load_tokenizer(
    path: str | Path | None = None, *, keep_case: bool = False, segment: bool = False
) -> PreTrainedTokenizerFast:
    """Loads or builds a tokenizer.

    Args:
        path: None for the default vocabulary; a vocab.txt (one token a line, its id is the line's index,
            special tokens at any place); a folder with tokenizer.json or vocab.txt; a tokenizer.json; or a
            hub name. A foreign BERT tokenizer gives its vocabulary only; it is rebuilt with the conventions
            above.
        keep_case: leave capital letters alone instead of lower-casing. A tokenizer that this package saved
            keeps what it was built with; asking one that lower-cases to keep case is an error.
        segment: word level. For a folder or tokenizer.json that `vocabulary --segment` built it is only a
            check. A vocab.txt of words, frequent ones first, cuts text into as few words as possible.

    Returns:
        The tokenizer; `len(tokenizer)` is the number of ids, all of 0 .. len - 1 in use.

    Raises:
        InputError: the file cannot be read, is no vocabulary, or lacks what was asked of it.
    """
    if path is None:
        if segment:
            raise InputError(f"the default vocabulary has no words to segment with; build some: {_BUILD_WORDS}")
        return _from_vocabulary_file(DEFAULT_VOCABULARY, keep_case, segment=False)
    location = Path(path)
    if location.is_dir():
        if (location / "tokenizer.json").is_file():
            return _from_json_file(location / "tokenizer.json", keep_case, segment)
        if (location / "vocab.txt").is_file():
            return _from_vocabulary_file(location / "vocab.txt", keep_case, segment)
        raise InputError(f"the folder {location} holds neither tokenizer.json nor vocab.txt")
    if location.is_file():
        if location.suffix == ".json":
            return _from_json_file(location, keep_case, segment)
        return _from_vocabulary_file(location, keep_case, segment)
    if location.suffix in _FILE_SUFFIXES or not _HUB_NAME.fullmatch(str(path)):
        raise InputError(f"no tokenizer file or folder {path} exists; give a vocab.txt or a tokenizer folder")
    return _from_hub(str(path), keep_case, segment)


def encode_article(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Encodes a whole article: [MASK], the ids of the text, [CLS]."""
    return encode_articles(tokenizer, [text])[0]


def encode_articles(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Encodes many articles at once, in parallel where there are cores; each as `encode_article` would."""
    backend = tokenizer.backend_tokenizer
    # An earlier padded or truncated call may have left its settings behind.
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    try:
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    except TypeError:
        encodings = backend.encode_batch_fast(
            [replace_lone_surrogates(text) for text in texts], add_special_tokens=False
        )
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    return [[begin, *encoding.ids, end] for encoding in encodings]


def locate_tokens(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[tuple[list[int], list[Span]]]:
    """Encodes texts and says where in them each token stands.

    Args:
        tokenizer: As `load_tokenizer` makes it.
        texts: To encode; several at once run in parallel where there are cores.

    Returns:
        For each text its ids, without begin and end of an article, and as many pairs (begin, end) of characters of the
        text. No pair is empty; tokens that are bytes of one character share it.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    written = [replace_lone_surrogates(text) if _SURROGATE.search(text) else text for text in texts]
    located = []
    for text, encoding in zip(texts, backend.encode_batch(written, add_special_tokens=False), strict=True):
        spans = [_not_empty(begin, end, len(text)) for begin, end in encoding.offsets]
        if _SURROGATE.search(text):
            # A pair of halves became one character.
            places = [*_places_of_characters(text), len(text)]
            spans = [(places[begin], places[end]) for begin, end in spans]
        located.append((encoding.ids, spans))
    return located


def _not_empty(begin: int, end: int, length: int) -> Span:
    """A span of at least one character, the last of the text at the latest."""
    begin = min(begin, length - 1)
    return begin, max(end, begin + 1)


def _places_of_characters(text: str) -> list[int]:
    """Where in a text with halves of surrogate pairs each character of `replace_lone_surrogates` begins."""
    places, place = [], 0
    while place < len(text):
        places.append(place)
        is_pair = "\ud800" <= text[place] <= "\udbff" and "\udc00" <= text[place + 1 : place + 2] <= "\udfff"
        place += 2 if is_pair else 1
    return places


def mask_token_of(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id of [MASK], which stands for hidden tokens; in GPT2-Chinese's conventions articles begin with it, too.

    Raises:
        InputError: the vocabulary has no such token.
    """
    ids = tokenizer.get_vocab()
    if BEGIN not in ids:
        raise InputError(f"the vocabulary has no {BEGIN}, which is to stand for hidden tokens; give one that has")
    return int(ids[BEGIN])


def encode_with_masks(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Encodes a whole article in which [MASK] stands for hidden tokens; `encode_article` reads it as letters."""
    mask = mask_token_of(tokenizer)
    pieces = encode_articles(tokenizer, text.split(BEGIN))
    ids = [pieces[0][0]]
    for number, piece in enumerate(pieces):
        ids += [*([mask] if number else []), *piece[1:-1]]
    return [*ids, pieces[0][-1]]


def normalize_text(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """The text as the tokenizer sees it: what `decode(encode(text))` gives if no character is unknown.

    It is idempotent; `backend.py` lists the steps.
    """
    backend = tokenizer.backend_tokenizer
    normalized: str = backend.normalizer.normalize_str(replace_lone_surrogates(text))
    if not _is_wordpiece(backend):
        normalized = normalized.replace(SPACE_MARK, " ")
    # A literal "[SEP]" has been lower-cased, so that each one left is a newline.
    return normalized.replace(NEWLINE, "\n")


def replace_lone_surrogates(text: str) -> str:
    """Replaces halves of surrogate pairs, which JSON can write and UTF-8 cannot, by U+FFFD; joins pairs."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """A hexadecimal SHA-256 that changes when some text's ids may change.

    It covers the backend's JSON (without padding and truncation, which any call may set) and special ids.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["padding"] = content["truncation"] = None
    content["special_ids"] = {
        "begin": tokenizer.bos_token_id,
        "end": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
        "unknown": tokenizer.unk_token_id,
        "newline": tokenizer.convert_tokens_to_ids(NEWLINE),
    }
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def wrap_backend(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """Wraps a backend of `backend.py` for transformers, with GPT2-Chinese's special tokens."""
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        # Without it a corpus that says "[CLS]" would end an article.
        split_special_tokens=True,
    )


def read_vocabulary(path: Path) -> list[str]:
    """Reads a vocab.txt.

    Args:
        path: UTF-8, one token a line; a byte order mark, CRLF and empty lines at the end are tolerated.

    Returns:
        The tokens, by id.

    Raises:
        InputError: unreadable, not UTF-8, empty, an empty or a repeated line, a special token missing.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read the vocabulary {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"the vocabulary {path} is not UTF-8: invalid byte at offset {error.start}; convert the file"
        ) from error
    # Not splitlines(): U+2028 and the like are tokens of some vocabularies.
    tokens = [line.removesuffix("\r") for line in text.split("\n")]
    while tokens and not tokens[-1]:
        tokens.pop()
    if not tokens:
        raise InputError(f"the vocabulary {path} is empty; it needs one token a line")
    first_lines: dict[str, int] = {}
    for number, token in enumerate(tokens, start=1):
        if not token:
            raise InputError(f"the vocabulary {path} has an empty line {number}; remove it or name the token")
        if token in first_lines:
            raise InputError(
                f"the vocabulary {path} has {token!r} twice, on lines {first_lines[token]} and {number}; remove one"
            )
        first_lines[token] = number
    _require_special_tokens(first_lines, path)
    return tokens


def _from_vocabulary_file(path: Path, keep_case: bool, segment: bool) -> PreTrainedTokenizerFast:
    tokens = read_vocabulary(path)
    if segment:
        return wrap_backend(_word_backend_of_lines(tokens, path, keep_case))
    return _from_wordpiece({token: index for index, token in enumerate(tokens)}, path, keep_case)


def _from_wordpiece(vocabulary: dict[str, int], source: Path | str, keep_case: bool) -> PreTrainedTokenizerFast:
    _require_capitals(vocabulary, source, keep_case)
    return wrap_backend(wordpiece_backend(vocabulary, keep_case=keep_case))


def _word_backend_of_lines(tokens: list[str], path: Path, keep_case: bool) -> Tokenizer:
    if not any(len(token) > 1 and all(ord(character) >= 0x2E80 for character in token) for token in tokens):
        raise InputError(f"{path} has no words of several hanzi to segment with; build some: {_BUILD_WORDS}")
    _require_capitals(dict.fromkeys(tokens, 0), path, keep_case)
    # Each word costs more than the rarest one's rank adds: fewer words always win, then frequent ones.
    toll = log(len(tokens) + 1)
    pieces = [(token, 0.0 if token == NEWLINE else -toll - log(rank)) for rank, token in enumerate(tokens, start=1)]
    return word_backend(pieces, keep_case=keep_case)


def _from_json_file(path: Path, keep_case: bool, segment: bool) -> PreTrainedTokenizerFast:
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read the tokenizer {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"the tokenizer {path} is not UTF-8: invalid byte at offset {error.start}; convert the file"
        ) from error
    return _from_json(content, path, keep_case, segment)


def _from_hub(name: str, keep_case: bool, segment: bool) -> PreTrainedTokenizerFast:
    try:
        content = AutoTokenizer.from_pretrained(name).backend_tokenizer.to_str()
    # The hub's client, transformers and tokenizers raise dozens of kinds; all mean that the name is no use.
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise InputError(
            f"there is no file or folder {name}, and no tokenizer of that name could be had from the hub "
            f"({reason}); give a vocab.txt or a tokenizer folder"
        ) from error
    return _from_json(content, name, keep_case, segment)


def _from_json(content: str, source: Path | str, keep_case: bool, segment: bool) -> PreTrainedTokenizerFast:
    try:
        backend = Tokenizer.from_str(content)
    # tokenizers raises a bare Exception for anything it cannot parse.
    except Exception as error:
        raise InputError(f"{source} is not a tokenizer.json that can be read: {error}") from error
    vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    _require_special_tokens(vocabulary, source)
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise InputError(f"the ids of {source} are not 0 .. {len(vocabulary) - 1}; give one without gaps")
    description: dict[str, Any] = json.loads(content)
    kind = description["model"].get("type") or type(backend.model).__name__
    if segment and kind != "Unigram":
        raise InputError(f"{source} was not built for word level; build one: {_BUILD_WORDS}")
    if not _is_ours(description):
        if kind != "WordPiece":
            raise InputError(
                f"{source} is a {kind} tokenizer that this package did not build; give one that it built, "
                "a vocab.txt or a BERT tokenizer"
            )
        return _from_wordpiece(vocabulary, source, keep_case)
    lower_cases = any(step["type"] == "Lowercase" for step in description["normalizer"]["normalizers"])
    if keep_case and lower_cases:
        raise InputError(f"{source} was built to lower-case; build it anew with keep_case or leave keep_case out")
    return wrap_backend(backend)


def _is_ours(description: dict[str, Any]) -> bool:
    # The mark of backend.build_normalizer: a newline becomes its token.
    normalizer = description.get("normalizer") or {}
    newline_step = {"type": "Replace", "pattern": {"String": "\n"}, "content": NEWLINE}
    return newline_step in normalizer.get("normalizers", [])


def _is_wordpiece(backend: Tokenizer) -> bool:
    return type(backend.model).__name__ == "WordPiece"


def _require_special_tokens(vocabulary: dict[str, int], source: Path | str) -> None:
    missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    if missing:
        raise InputError(
            f"the vocabulary {source} lacks {', '.join(missing)}; it needs {' '.join(SPECIAL_TOKENS)}, at any place"
        )


def _require_capitals(vocabulary: dict[str, int], source: Path | str, keep_case: bool) -> None:
    if keep_case and not any(chr(code) in vocabulary for code in range(ord("A"), ord("Z") + 1)):
        raise InputError(f"the vocabulary {source} has no capital letters; leave keep_case out")
