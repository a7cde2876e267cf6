"""Counting what the vocabulary does not know while a corpus is tokenised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from reformer_lm.text.tokenizer import normalize_text


class UnknownCounter:
    """Counts [UNK] tokens and the characters behind them.

    Feeding it costs a scan of the ids; only an article that has an [UNK] is looked at more closely.

    Attributes:
        tokens: how many ids were counted.
        unknown: how many of them are [UNK].
        characters: the unknown characters of the texts, with their counts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Starts at zero.

        Args:
            tokenizer: the one that makes the ids.
        """
        self._tokenizer = tokenizer
        self._unknown_id = tokenizer.unk_token_id
        self._known = {token for token in tokenizer.get_vocab() if len(token) == 1} | {" ", "\n"}
        self.characters: Counter[str] = Counter()
        self.tokens = 0
        self.unknown = 0

    def add(self, text: str, ids: Sequence[int]) -> None:
        """Counts one article.

        Args:
            text: the article, as it was given to the tokenizer.
            ids: what the tokenizer made of it, with or without the begin and end tokens.
        """
        self.tokens += len(ids)
        unknown = ids.count(self._unknown_id)
        if not unknown:
            return
        self.unknown += unknown
        for character, count in Counter(normalize_text(self._tokenizer, text)).items():
            if character not in self._known:
                self.characters[character] += count

    @property
    def share(self) -> float:
        """The part of all tokens, from 0 to 1, that is [UNK]."""
        return self.unknown / self.tokens if self.tokens else 0.0

    def most_frequent(self, limit: int = 10) -> list[tuple[str, int]]:
        """The most frequent unknown characters and their counts; equal counts in the order of code points."""
        return sorted(self.characters.items(), key=lambda item: (-item[1], item[0]))[:limit]

    def message(self, threshold: float = 0.01, limit: int = 10) -> str:
        """One line for the user, or "" while the share is not above the threshold.

        Args:
            threshold: share of [UNK] that is nothing to speak of, from 0 to 1.
            limit: how many characters to name.
        """
        if self.share <= threshold:
            return ""
        named = ", ".join(
            f"{character if character.isprintable() else f'U+{ord(character):04X}'} x {count:,}"
            for character, count in self.most_frequent(limit)
        )
        # A corpus that others have encoded does not say which they were.
        examples = f"; most frequent unknown characters: {named}" if named else ""
        return (
            f"{self.share:.2%} of the tokens are [UNK] ({self.unknown:,} of {self.tokens:,}){examples}. "
            "Build a vocabulary from this corpus with "
            "python -m reformer_lm.text.vocabulary --corpus FILE --output vocab.txt"
        )
