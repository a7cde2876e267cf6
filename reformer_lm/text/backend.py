"""The `tokenizers` pipelines: normalizer, pre-tokenizer, model and decoder, all inside tokenizer.json.

Three models share one normalization:

- WordPiece (`wordpiece_backend`): every character that is not *spaced* (below) is one token; runs of spaced
  characters are matched by BERT's greedy WordPiece, `##` marking a piece glued to the one before it.
- Word level (`word_backend`): a Unigram model over words and characters. Its Viterbi search is the same
  most-probable-path search that jieba makes over its dictionary, but the words and their log
  probabilities are in tokenizer.json, so that a saved tokenizer segments without jieba. A word that is not in
  the vocabulary falls back to its characters.
- BPE (`bpe_backend`).

The last two write a space as the character U+2581, as sentencepiece does, but add none of their own.

Normalization, in this order (`normalize_text` in `tokenizer.py` shows its result):

1. CRLF, CR, VT, FF, NEL, U+2028 and U+2029 become LF; other control and format characters (zero-width
   spaces, byte order marks, ...) are removed.
2. Letters are lower-cased, unless `keep_case`.
3. Unicode NFC: combining marks join their letter. Not NFKC: full-width punctuation stays full-width.
4. Runs of spaces (tabs, no-break, ideographic U+3000, ...) become one ASCII space. A space is kept only
   between two *spaced* characters; next to anything else (hanzi, full-width punctuation, a newline, the ends
   of the text, a character the vocabulary does not know) it is dropped. Newlines are all kept.
5. A run of more than 100 spaced characters is broken by a space after every 100th (BERT's limit). WordPiece
   only: a word that starts with ## and a third character gets a space after the first #, because the
   vocabulary's `##x` means something else.
6. With `keep_case`, the literal texts [PAD] [UNK] [CLS] [SEP] [MASK] are lower-cased (without it step 2 has
   done so), so that no corpus can smuggle in a special token; step 7 relies on it.
7. Internally, LF becomes "[SEP]", the token of a newline.

*Spaced* characters are those next to which the vocabulary can tell a space from none. For WordPiece these are
the letters and digits with both pieces `x` and `##x`, and ASCII punctuation if all of it has both; so
"a.b" and "a. b" differ under the default vocabulary, while BERT's own vocabularies, having no `##,`, split
punctuation off and drop the spaces next to it. For the other models they are the ASCII characters of a
vocabulary that contains U+2581.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from reformer_lm.text.conventions import (
    ASCII_CHARACTERS,
    CONTINUATION,
    LONGEST_RUN,
    NEWLINE,
    SKIPPED_TOKENS,
    SPACE_MARK,
    SPECIAL_TOKENS,
    UNKNOWN,
)

# Unicode's White_Space without the line breaks.
_SPACES = r"[\t \x{A0}\x{1680}\x{2000}-\x{200A}\x{202F}\x{205F}\x{3000}]"
# What composes with the character before it: marks, and the vowels and finals of decomposed hangul.
_COMPOSING = r"[\p{M}\x{1161}-\x{1175}\x{11A8}-\x{11C2}]"
# Scripts that put spaces between words all lie below; CJK and general punctuation above.
_SPACED_LETTERS_END = 0x2000


def character_class(characters: Iterable[str]) -> str:
    """Writes a set of characters as a regular expression's class, e.g. [A-Z], by code points."""
    ranges: list[list[int]] = []
    for code in sorted({ord(character) for character in characters}):
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    if not ranges:
        # An empty class is no valid expression; NUL is the one character that normalization never leaves.
        return r"[\x{0}]"
    return "[" + "".join(rf"\x{{{first:X}}}-\x{{{last:X}}}" for first, last in ranges) + "]"


def wordpiece_spaced_characters(vocabulary: Collection[str]) -> frozenset[str]:
    """The characters next to which a WordPiece vocabulary can tell a space from none (see the module)."""

    def has_both(character: str) -> bool:
        return character in vocabulary and CONTINUATION + character in vocabulary

    punctuation = [c for c in ASCII_CHARACTERS if not c.isalnum() and c in vocabulary]
    spaced = {
        piece
        for piece in vocabulary
        if len(piece) == 1 and piece.isalnum() and ord(piece) < _SPACED_LETTERS_END and has_both(piece)
    }
    if all(has_both(character) for character in punctuation):
        spaced.update(punctuation)
    return frozenset(spaced)


def marked_spaced_characters(vocabulary: Collection[str]) -> frozenset[str]:
    """The characters next to which a BPE or word-level vocabulary can tell a space from none."""
    if SPACE_MARK not in vocabulary:
        return frozenset()
    return frozenset(character for character in ASCII_CHARACTERS if character in vocabulary)


def build_normalizer(spaced: Collection[str], *, keep_case: bool, mark_spaces: bool) -> normalizers.Normalizer:
    """Builds the normalization that the module's docstring describes.

    Args:
        spaced: characters next to which a space matters.
        keep_case: leave capital letters alone.
        mark_spaces: write the remaining spaces as U+2581 (BPE and word level).

    Returns:
        A normalizer whose output holds "[SEP]" for each newline.
    """
    near = character_class(spaced)
    steps: list[normalizers.Normalizer] = [
        normalizers.Replace(Regex(r"\r\n|[\r\x{B}\x{C}\x{85}\x{2028}\x{2029}]"), "\n"),
        normalizers.Replace(Regex(r"[\p{Cc}\p{Cf}&&[^\n\t]]"), ""),
    ]
    if not keep_case:
        steps.append(normalizers.Lowercase())
    if mark_spaces:
        # A literal mark would come back as a space.
        steps.append(normalizers.Replace(SPACE_MARK, "_"))
    steps += [
        # Before composing: dropping the space later would let the mark compose only on a second pass.
        normalizers.Replace(Regex(f"{_SPACES}+(?={_COMPOSING})"), ""),
        normalizers.NFC(),
        normalizers.Replace(Regex(f"{_SPACES}+"), " "),
        normalizers.Replace(Regex(f"(?<!{near}) | (?!{near})"), ""),
        normalizers.Replace(Regex(f"{near}{{{LONGEST_RUN}}}\\K(?={near})"), " "),
    ]
    if "#" in spaced and not mark_spaces:
        # \G goes on where the last match ended, so that "###x" becomes "# # #x".
        steps.append(normalizers.Replace(Regex(rf"(?:(?<!{near})|\G)#\K(?=#{near})"), " "))
    if keep_case:
        steps += [normalizers.Replace(token, token.lower()) for token in SPECIAL_TOKENS]
    if mark_spaces:
        steps.append(normalizers.Replace(" ", SPACE_MARK))
    steps.append(normalizers.Replace("\n", NEWLINE))
    return normalizers.Sequence(steps)


def marked_pre_tokenizer(vocabulary: Collection[str]) -> pre_tokenizers.PreTokenizer:
    """Cuts text for BPE and word level: runs of known hanzi, words of known letters, single other characters.

    A space mark goes with what follows it. A character that no token holds stands alone, so that it costs one
    [UNK] and leaves its neighbours whole. (One that only words hold, as a list of words without their
    characters may have it, stays in its run, where Unigram makes one [UNK] of several in a row.)

    Args:
        vocabulary: all tokens.
    """
    known = {
        character
        for piece in vocabulary
        if piece not in SPECIAL_TOKENS and not piece.startswith(CONTINUATION)
        for character in piece
    }
    letters = character_class(c for c in known if c.isalpha() and ord(c) < _SPACED_LETTERS_END)
    hanzi = character_class(c for c in known if c.isalpha() and ord(c) >= _SPACED_LETTERS_END)
    pieces = rf"{_escaped(NEWLINE)}|{SPACE_MARK}?{letters}+|{hanzi}+|{SPACE_MARK}?."
    return pre_tokenizers.Split(Regex(pieces), "isolated")


def wordpiece_backend(vocabulary: Mapping[str, int], *, keep_case: bool) -> Tokenizer:
    """Builds the WordPiece tokenizer of a vocabulary that holds the five special tokens."""
    spaced = wordpiece_spaced_characters(vocabulary)
    near = character_class(spaced)
    model = models.WordPiece(
        dict(vocabulary),
        unk_token=UNKNOWN,
        continuing_subword_prefix=CONTINUATION,
        max_input_chars_per_word=LONGEST_RUN,
    )
    backend = Tokenizer(model)
    backend.normalizer = build_normalizer(spaced, keep_case=keep_case, mark_spaces=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            # What is not spaced stands alone: a hanzi is a token, an unknown character is one [UNK].
            pre_tokenizers.Split(Regex(rf"{_escaped(NEWLINE)}|(?!{near})."), "isolated"),
        ]
    )
    skipped = "|".join(_escaped(token) for token in SKIPPED_TOKENS)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex(rf"\A{_escaped(NEWLINE)}\z"), "\n"),
            # Not decoders.WordPiece: it leaves the ## of a first piece, as when a continuation is decoded
            # alone. A space goes before each piece that starts a word, then ## comes off the others.
            decoders.Replace(Regex(rf"\A(?!{CONTINUATION}.)"), " "),
            decoders.Replace(Regex(rf"\A{CONTINUATION}(?=.)"), ""),
            decoders.Fuse(),
            decoders.Replace(Regex(rf" (?={skipped})|(?<={skipped}) |(?<!{near}) | (?!{near})"), ""),
        ]
    )
    return _with_special_tokens(backend)


def word_backend(pieces: Sequence[tuple[str, float]], *, keep_case: bool) -> Tokenizer:
    """Builds the word-level tokenizer.

    Args:
        pieces: tokens in the order of their ids, each with its log probability; [SEP] should have 0.
        keep_case: leave capital letters alone.
    """
    ids = {piece: index for index, (piece, _) in enumerate(pieces)}
    return _marked_backend(Tokenizer(models.Unigram(list(pieces), ids[UNKNOWN])), ids, keep_case)


def bpe_backend(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], *, keep_case: bool) -> Tokenizer:
    """Builds the BPE tokenizer of a vocabulary and its merges in order."""
    # ignore_merges takes a piece that is a token as it is: that is how "[SEP]" stays whole.
    model = models.BPE(dict(vocabulary), list(merges), unk_token=UNKNOWN, fuse_unk=False, ignore_merges=True)
    return _marked_backend(Tokenizer(model), vocabulary, keep_case)


def _marked_backend(backend: Tokenizer, vocabulary: Collection[str], keep_case: bool) -> Tokenizer:
    spaced = marked_spaced_characters(vocabulary)
    backend.normalizer = build_normalizer(spaced, keep_case=keep_case, mark_spaces=True)
    backend.pre_tokenizer = marked_pre_tokenizer(vocabulary)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex(rf"\A{_escaped(NEWLINE)}\z"), "\n"),
            decoders.Replace(SPACE_MARK, " "),
            decoders.Fuse(),
        ]
    )
    return _with_special_tokens(backend)


def _with_special_tokens(backend: Tokenizer) -> Tokenizer:
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SKIPPED_TOKENS])
    # Adds nothing, as transformers would write it, so that the JSON is the same before and after wrapping.
    backend.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
    return backend


def _escaped(token: str) -> str:
    return token.replace("[", r"\[").replace("]", r"\]")
