"""Pairs of a source and a target text, for ``--task seq2seq``: read, tokenised and made into batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from reformer_lm.corpus import find_files
from reformer_lm.corpus.files import TextFile
from reformer_lm.corpus.readers import format_of
from reformer_lm.errors import InputError
from reformer_lm.text import encode_articles
from reformer_lm.training.evaluation import Validation
from reformer_lm.training.masking import IGNORED
from reformer_lm.training.parallel import Processes

# Texts that are tokenised together.
_AT_ONCE = 1024


@dataclass(frozen=True)
class Pairs:
    """Tokenised pairs, held in memory.

    Attributes:
        sources: int64 [S] each, with begin and end of an article.
        targets: int64 [T] each, likewise.
        pad_token: What fills up shorter rows.
        digest: SHA-256 of the tokens, in hexadecimal.
        files: The files they were read from, with the number of pairs in each.
    """

    sources: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    pad_token: int
    digest: str
    files: tuple[tuple[str, int], ...]

    @property
    def length(self) -> int:
        """Tokens of the longest target."""
        return max(map(len, self.targets))

    @property
    def stride(self) -> int:
        """As windows have it; pairs do not overlap."""
        return self.length

    @property
    def num_tokens(self) -> int:
        """Tokens of all sources and targets."""
        return sum(map(len, (*self.sources, *self.targets)))

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.sources)

    def batch(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """Some targets as rows: LongTensor [len(indices), longest], padded at the end."""
        rows = [self.targets[int(index)] for index in indices]
        return pad_sequence(rows, batch_first=True, padding_value=self.pad_token)

    def inputs(self, indices: Sequence[int] | np.ndarray) -> tuple[dict[str, Tensor], int]:
        """What the model is given of some pairs, and how many tokens it predicts.

        The decoder reads the target up to its last token but one, and is scored on the tokens after the first: the
        target alone, with its end.
        """
        sources = [self.sources[int(index)] for index in indices]
        targets = [self.targets[int(index)] for index in indices]
        labels = pad_sequence([row[1:] for row in targets], batch_first=True, padding_value=IGNORED)
        inputs = {
            "input_ids": pad_sequence(sources, batch_first=True, padding_value=self.pad_token),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in sources], batch_first=True),
            "decoder_input_ids": pad_sequence(
                [row[:-1] for row in targets], batch_first=True, padding_value=self.pad_token
            ),
            "decoder_attention_mask": (labels != IGNORED).long(),
            "labels": labels,
        }
        return inputs, int((labels != IGNORED).sum())


@dataclass(frozen=True)
class PairBatches:
    """Makes the model's inputs from pairs, as `BatchMaker` does from windows."""

    pairs: Pairs

    def make(self, indices: np.ndarray, epoch: int) -> tuple[dict[str, Tensor], int]:
        """Inputs of a batch, and how many tokens it predicts.

        Args:
            indices: Of pairs; none at all gives a batch that has no effect.
            epoch: Has no influence.
        """
        if len(indices):
            return self.pairs.inputs(indices)
        inputs, _ = self.pairs.inputs([0])
        return {**inputs, "labels": torch.full_like(inputs["labels"], IGNORED)}, 0


def read_pairs(
    paths: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    *,
    source_field: str = "source",
    target_field: str = "target",
    encoding: str = "utf-8",
    longest: int,
) -> Pairs:
    """Read pairs from .jsonl files: one object a line, with two strings.

    Args:
        paths: Files, folders or patterns.
        tokenizer: Of the run.
        source_field: Field that holds the source.
        target_field: Field that holds the target.
        encoding: ``utf-8`` or ``gb18030``.
        longest: Most tokens that a source or a target may have, begin and end included.

    Raises:
        InputError: If a file is missing or of another format, a line is no such object, a text is empty or too long,
            or there is no pair at all.
    """
    texts: list[tuple[str, str]] = []
    places: list[tuple[Path, int]] = []
    counts = []
    for path in find_files(paths):
        if format_of(path) != ".jsonl":
            raise InputError(
                f"{path}: pairs come in .jsonl files, one object a line: "
                f'{{"{source_field}": "...", "{target_field}": "..."}}'
            )
        before = len(texts)
        for number, line in enumerate(TextFile(path, encoding).lines(), start=1):
            if line.strip():
                texts.append(_pair_of(path, number, line, source_field, target_field))
                places.append((path, number))
        counts.append((str(path), len(texts) - before))
    if not texts:
        raise InputError(f"{' '.join(paths)}: no pair in it; give one object a line")
    columns: list[list[Tensor]] = [[], []]
    digest = hashlib.sha256()
    for column, name in enumerate((source_field, target_field)):
        for first in range(0, len(texts), _AT_ONCE):
            encoded = encode_articles(tokenizer, [pair[column] for pair in texts[first : first + _AT_ONCE]])
            for ids, (path, number) in zip(encoded, places[first:], strict=False):
                if len(ids) > longest:
                    raise InputError(
                        f"{path}: line {number}: the {name} has {len(ids):,} tokens, more than {longest:,}; shorten "
                        "it, or give a larger --max_seq_len or max_position_embeddings"
                    )
                columns[column].append(torch.tensor(ids))
                digest.update(np.asarray([len(ids), *ids], dtype=np.int64).tobytes())
    return Pairs(tuple(columns[0]), tuple(columns[1]), tokenizer.pad_token_id, digest.hexdigest(), tuple(counts))


def _pair_of(path: Path, number: int, line: str, source_field: str, target_field: str) -> tuple[str, str]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: invalid JSON at line {number} column {error.colno}: {error.msg}") from None
    except (RecursionError, ValueError):
        raise InputError(f"{path}: invalid JSON at line {number}") from None
    found = []
    for field, flag in ((source_field, "--source_field"), (target_field, "--target_field")):
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(text, str) or not text.strip():
            problem = "is empty" if isinstance(text, str) else "is missing or no string"
            raise InputError(
                f"{path}: line {number}: {field!r} {problem}; mend the line, or name the field with {flag}"
            )
        found.append(text)
    return found[0], found[1]


def validate_pairs(
    model: nn.Module,
    pairs: Pairs,
    batch_size: int,
    device: torch.device,
    should_stop: Callable[[], bool],
    processes: Processes,
) -> Validation | None:
    """Mean loss of a model over the targets of pairs; see `validate`.

    Args:
        model: An encoder-decoder; it is left in the mode it was in.
        pairs: To score.
        batch_size: Pairs at a time.
        device: Where the model is.
        should_stop: Asked before each batch; if it says yes, validation is given up.
        processes: Those that share the work.

    Returns:
        The result, None if it was given up.
    """
    was_training = model.training
    model.eval()
    groups = [range(first, min(first + batch_size, len(pairs))) for first in range(0, len(pairs), batch_size)]
    total = scored = 0.0
    try:
        with torch.no_grad():
            for first in range(0, len(groups), processes.count):
                if processes.any(should_stop()):
                    return None
                number = first + processes.rank
                inputs, count = pairs.inputs(groups[min(number, len(groups) - 1)])
                # Divided by 1: the sum, which is added up in double precision.
                output = model(
                    **{name: x.to(device) for name, x in inputs.items()}, num_items_in_batch=1, skip_logits=True
                )
                if number < len(groups):
                    total += float(output.loss)
                    scored += count
    finally:
        model.train(was_training)
    total, scored = processes.sum([total, scored])
    return Validation(total / scored, int(scored))
