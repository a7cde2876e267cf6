"""How texts are cut into windows and windows are put into batches when they are scored."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

# Tokens in one forward pass, padding included, unless told otherwise.
TOKENS_PER_BATCH = 4096
# Fewest tokens in one forward pass, empty rows included: more than layers/linear.py calls few.
LEAST_TOKENS = 48
# Windows of one length that have so few tokens are not divided further.
_SMALL_BATCH_TOKENS = 512


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


# Of an empty row.
EMPTY = Window(-1, (), (), 0, 0)


def cut_windows(text_index: int, sequence: Sequence[int], window: int, context: int, first: int = 0) -> list[Window]:
    """Cut a token sequence into windows that score each token from one on exactly once.

    Args:
        text_index: Copied into the windows.
        sequence: The tokens with the article start before them: token i of the text is ``sequence[i + 1]``.
        window: Most tokens in a window.
        context: Tokens read by a further window up to and including the one that predicts its first scored
            token.
        first: Index of the first token to score; those before it are only read.

    Returns:
        The windows in order; none if there is nothing to score. A sequence of up to ``window + 1`` tokens
        needs one.
    """
    windows: list[Window] = []
    count = len(sequence) - 1
    scored = first
    while scored < count:
        # The token that predicts number `scored` of the text stands at the same index of the sequence.
        start = 0 if scored == first < window else max(0, scored + 1 - context)
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


def plan_batches(
    windows: Iterable[Window],
    batch_size: int | None,
    longest: int,
    batch_tokens: int = TOKENS_PER_BATCH,
    *,
    pad: bool = True,
) -> list[Batch]:
    """Sort windows into batches in which each is padded to a length that depends on its own only.

    Args:
        windows: The windows to run.
        batch_size: Most rows of a batch; None for as many as fit.
        longest: The longest that a batch may be, in tokens.
        batch_tokens: Most tokens of a batch, padding included, unless a single window is longer.
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
        rows = max(1, batch_tokens // length)
        if batch_size is not None:
            rows = min(rows, batch_size)
        first = 0
        for count in _rows_of_batches(len(group), rows, length):
            batches.append(Batch(group[first : first + count], length))
            first += count
    return batches


def _rows_of_batches(windows: int, most: int, length: int) -> Iterator[int]:
    """Divide windows into batches of a power of two each, but for a small rest, which empty rows fill up."""
    rows = 1 << (most.bit_length() - 1)
    while windows:
        while rows > windows and rows * length > _SMALL_BATCH_TOKENS:
            rows //= 2
        yield min(rows, windows)
        windows -= min(rows, windows)


def padded_length(length: int) -> int:
    """Round a length up to one of few, at most an eighth longer (or to a multiple of 4).

    Args:
        length: Tokens in a window, at least 1.

    Returns:
        The length to which a window is padded.
    """
    step = max(4, (1 << length.bit_length()) // 16)
    return -(-length // step) * step


def rows_to_run(rows: int, length: int) -> int:
    """Rows of a batch with the empty ones that it is filled up with.

    There are few sizes of batches, since for each a library may make and keep code of its own; and none with hardly any
    tokens, since products of a few rows are taken by other kernels, which add up in another order.

    Args:
        rows: Windows of the batch.
        length: Tokens of each, padding included.

    Returns:
        A power of two, at least ``rows`` and enough for `LEAST_TOKENS`.
    """
    least = max(rows, -(-LEAST_TOKENS // length))
    return 1 << (least - 1).bit_length()
