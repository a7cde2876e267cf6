"""Text as it grows: the seam between a prompt and its continuation, streaming, and strings that end it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria, TextStreamer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Tokens of the prompt that are decoded before the first new token, so that the seam between them is right.
STREAMED_CONTEXT = 16


def continuation_text(tokenizer: PreTrainedTokenizerFast, prompt: Sequence[int], continuation: Iterable[int]) -> str:
    """The text that tokens add to a prompt, with the space (or the join of a word) between the two.

    Args:
        tokenizer: The tokenizer to decode with.
        prompt: The last tokens of the prompt.
        continuation: The tokens after it.

    Returns:
        The text; special tokens are left out.
    """
    before = tokenizer.decode(list(prompt), skip_special_tokens=True)
    whole = tokenizer.decode([*prompt, *continuation], skip_special_tokens=True)
    return whole[len(before) :]


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the first of the strings begins in a text, or None."""
    found = [at for at in (text.find(string) for string in stop) if at >= 0]
    return min(found) if found else None


class StopStrings(StoppingCriteria):
    """Ends a row as soon as its new text holds one of some strings.

    Args:
        tokenizer: The tokenizer to decode with.
        stop: The strings.
        prompts: Of each row, the tokens before its new ones; the last of them are enough.
        earlier: Of each row, new tokens from before this call of ``generate()``.
        begin: Columns of the input before the first new token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        stop: Sequence[str],
        prompts: Sequence[Sequence[int]],
        earlier: Sequence[Sequence[int]],
        begin: int,
    ) -> None:
        self._tokenizer, self._stop, self._begin = tokenizer, stop, begin
        self._prompts, self._earlier = prompts, earlier
        # A token adds a character at least, but for special ones; so the newest string lies within so many.
        self._tail = max(map(len, stop)) + STREAMED_CONTEXT

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Which rows have ended, bool [rows]."""
        ended = [
            self._has_ended([*prompt, *earlier, *new], len(earlier) + len(new))
            for prompt, earlier, new in zip(
                self._prompts, self._earlier, input_ids[:, self._begin :].tolist(), strict=True
            )
        ]
        return torch.tensor(ended, device=input_ids.device)

    def _has_ended(self, tokens: list[int], new: int) -> bool:
        tail = min(new, self._tail)
        before = tokens[: len(tokens) - tail][-STREAMED_CONTEXT:]
        return (
            first_stop(continuation_text(self._tokenizer, before, tokens[len(tokens) - tail :]), self._stop) is not None
        )


class ContinuationStreamer(TextStreamer):
    """Hands the continuation to a function as it grows, a Chinese character at a time.

    Decoding one token more only ever appends text, so that what it has written is exactly
    ``GeneratedText.text``. transformers' own streamer decodes new tokens apart from the prompt and forgets
    them at a newline, which loses spaces and joins of words at such seams.

    Args:
        tokenizer: The tokenizer to decode with.
        write: Receives each new piece of text.
        stop: Strings that end the text. What may yet become one of them is held back until that is certain.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, write: Callable[[str], None], stop: Sequence[str] = ()
    ) -> None:
        super().__init__(tokenizer)
        self._write = write
        self._stop = stop
        self._tokens: list[int] = []
        self._held = ""
        self._stopped = False

    def put(self, value: torch.Tensor) -> None:
        """Receive the prompt, then one token at a time.

        Args:
            value: [1, tokens] at first, then [1].
        """
        if self._tokens:
            self._add(continuation_text(self.tokenizer, self._tokens, value.tolist()))
        self._tokens = [*self._tokens, *value.flatten().tolist()][-STREAMED_CONTEXT:]

    def end(self) -> None:
        """Write what was held back, and get ready for another sample."""
        if self._held:
            self._write(self._held)
        self._tokens, self._held, self._stopped = [], "", False

    def _add(self, piece: str) -> None:
        if self._stopped:
            return
        text = self._held + piece
        stopped_at = first_stop(text, self._stop)
        if stopped_at is not None:
            self._stopped, self._held, text = True, "", text[:stopped_at]
        else:
            longest = max((_overlap(text, string) for string in self._stop), default=0)
            self._held = text[len(text) - longest :]
            text = text[: len(text) - longest]
        if text:
            self._write(text)


def _overlap(text: str, string: str) -> int:
    """How many of a text's last characters are the first ones of a string."""
    longest = min(len(text), len(string) - 1)
    return next((count for count in range(longest, 0, -1) if text.endswith(string[:count])), 0)


class Relay:
    """Lets several calls of ``generate()`` look like one to a streamer: one prompt, and no end until it is said."""

    def __init__(self, streamer: TextStreamer) -> None:
        self._streamer = streamer
        self._begun = False

    def put(self, value: torch.Tensor) -> None:
        """A prompt [1, tokens], of which only the first is handed on, or new tokens [1]."""
        if value.dim() == 1 or not self._begun:
            self._streamer.put(value)
        self._begun = True

    def end(self) -> None:
        """Of one call; not handed on."""
