"""How texts are cut into windows and windows are put into batches when they are scored."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Padded tokens in one forward pass, unless a single window is longer than that.
TOKENS_PER_BATCH = 4096


@dataclass(frozen=True)
class Window:
    """A piece of a text that is read in one go.

    Attributes:
        text_index: Which text of the block.
        inputs: The tokens that are read.
        targets: The token that follows each input.
        first_scored: Index in the text of the first token that this window scores.
        end_scored: Index in the text after the last token that it scores.
    """

    text_index: int
    inputs: Sequence[int]
    targets: Sequence[int]
    first_scored: int
    end_scored: int


def cut_windows(text_index: int, sequence: Sequence[int], window: int, context: int) -> list[Window]:
    """Cut a token sequence into windows that score each token but the first exactly once.

    Args:
        text_index: Copied into the windows.
        sequence: The tokens with the article start before them: token i of the text is ``sequence[i + 1]``.
        window: Most tokens in a window.
        context: Tokens read by a further window up to and including the one that predicts its first scored
            token.

    Returns:
        The windows in order; none if there is nothing to score. A sequence of up to ``window + 1`` tokens
        needs one.
    """
    windows: list[Window] = []
    count = len(sequence) - 1
    scored = 0
    while scored < count:
        # The token that predicts number `scored` of the text stands at the same index of the sequence.
        start = max(0, scored + 1 - context) if scored else 0
        end = min(start + window, count)
        windows.append(
            Window(
                text_index,
                sequence[start:end],
                sequence[start + 1 : end + 1],
                first_scored=scored,
                end_scored=end,
            )
        )
        scored = end
    return windows


@dataclass(frozen=True)
class Batch:
    """Windows of about the same length, which are run together.

    Attributes:
        windows: One for each row.
        length: Tokens to which they are padded on the right.
    """

    windows: Sequence[Window]
    length: int


def plan_batches(windows: Iterable[Window], batch_size: int, longest: int, *, pad: bool = True) -> list[Batch]:
    """Sort windows into batches in which each is padded to a length that depends on its own only.

    Args:
        windows: The windows to run.
        batch_size: Most rows of a batch.
        longest: The longest that a batch may be, in tokens.
        pad: Whether windows of different lengths may share a batch.

    Returns:
        The batches, from the shortest to the longest, windows of one length in their given order.
    """
    by_length: defaultdict[int, list[Window]] = defaultdict(list)
    for window in windows:
        length = len(window.inputs)
        by_length[min(padded_length(length), longest) if pad else length].append(window)
    batches: list[Batch] = []
    for length, group in sorted(by_length.items()):
        rows = max(1, min(batch_size, TOKENS_PER_BATCH // length))
        batches.extend(Batch(group[first : first + rows], length) for first in range(0, len(group), rows))
    return batches


def padded_length(length: int) -> int:
    """Round a length up to one of few, at most an eighth longer (or to a multiple of 16).

    Args:
        length: Tokens in a window, at least 1.

    Returns:
        The length to which a window is padded.
    """
    step = max(16, (1 << length.bit_length()) // 16)
    return -(-length // step) * step
