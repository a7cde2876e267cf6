"""Names every part of the text package agrees on: GPT2-Chinese's use of BERT's five special tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Final

PAD: Final = "[PAD]"
UNKNOWN: Final = "[UNK]"
END: Final = "[CLS]"
NEWLINE: Final = "[SEP]"
BEGIN: Final = "[MASK]"

# BERT's order, which is also the order of the first five ids of every vocabulary built here.
SPECIAL_TOKENS: Final = (PAD, UNKNOWN, END, NEWLINE, BEGIN)

# What `decode(skip_special_tokens=True)` leaves out. The newline is text, so it is not among them.
SKIPPED_TOKENS: Final = (PAD, UNKNOWN, END, BEGIN)

CONTINUATION: Final = "##"

# Stands for a space inside the pieces of BPE and word-level vocabularies (sentencepiece's character).
SPACE_MARK: Final = "\u2581"

# BERT's own limit for one WordPiece word; matching costs the square of the length, so it must be bounded.
LONGEST_RUN: Final = 100

# Every printable ASCII character but the space.
ASCII_CHARACTERS: Final = tuple(chr(code) for code in range(0x21, 0x7F))

DEFAULT_VOCABULARY: Final = Path(__file__).with_name("default_vocab.txt")
