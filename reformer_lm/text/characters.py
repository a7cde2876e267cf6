"""The characters that every vocabulary built here starts with."""

from __future__ import annotations

from reformer_lm.text.conventions import ASCII_CHARACTERS, CONTINUATION, SPACE_MARK, SPECIAL_TOKENS

# Rows of GB 2312 (each has 94 places): symbols, numerals such as U+2460, full-width ASCII, then the hanzi.
_SYMBOL_ROWS = range(1, 4)
_HANZI_ROWS = range(16, 88)

# What modern Chinese text uses beyond GB 2312's symbols. Python's codec reads two places of GB 2312 as U+2015
# and U+30FB where everybody writes U+2014 and U+00B7.
_MORE_SYMBOLS = (
    "\u2014\u00b7\u2013\u2022\u2025\u2027\u2500\u2e3a"
    "\u3007\u3008\u3009\u3012\u301c\u301d\u301e\u301f"
    "\uff5e\uff5f\uff60\uffe0\uffe1\uffe3\uffe5"
    # GB 2312 has the Roman numerals in capitals only, and lower-casing reaches them.
    "\u2170\u2171\u2172\u2173\u2174\u2175\u2176\u2177\u2178\u2179\u217a\u217b"
    "\u20ac\u00a3\u00a5\u00a9\u00ae\u2122\u2713\u00b2\u00b3\u00b5\u00bd"
)


def gb2312_rows(rows: range) -> list[str]:
    """All characters of some rows of GB 2312, in its order, as Python's codec reads them."""
    characters = []
    for row in rows:
        for cell in range(1, 95):
            try:
                characters.append(bytes([0xA0 + row, 0xA0 + cell]).decode("gb2312"))
            except UnicodeDecodeError:
                # A place that the standard leaves empty.
                continue
    return characters


def hanzi() -> list[str]:
    """The 6,763 hanzi of GB 2312: the 3,755 frequent ones by pinyin, then 3,008 by radical."""
    return gb2312_rows(_HANZI_ROWS)


def symbols() -> list[str]:
    """CJK and full-width punctuation and other symbols, each once; normalization makes U+3000 a space."""
    return [c for c in dict.fromkeys([*gb2312_rows(_SYMBOL_ROWS), *_MORE_SYMBOLS]) if c != "\u3000"]


def wordpiece_base() -> list[str]:
    """Special tokens, ASCII with its continuations, symbols."""
    continuations = [CONTINUATION + character for character in ASCII_CHARACTERS]
    return [*SPECIAL_TOKENS, *ASCII_CHARACTERS, *continuations, *symbols()]


def marked_base() -> list[str]:
    """Special tokens, the space mark, ASCII, symbols: the base of BPE and word level."""
    return [*SPECIAL_TOKENS, SPACE_MARK, *ASCII_CHARACTERS, *symbols()]
