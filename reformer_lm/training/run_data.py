"""What a run trains and is judged on: windows of a corpus, or pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from reformer_lm.corpus import ArticleWindows, EvaluationWindows, TokenWindows
from reformer_lm.errors import InputError
from reformer_lm.training.arguments import RunRequest
from reformer_lm.training.batches import Windows
from reformer_lm.training.corpora import prepare_training_stream, prepare_validation_stream
from reformer_lm.training.pairs import Pairs, read_pairs
from reformer_lm.training.reporting import Reporter
from reformer_lm.training.state import DataIdentity

# Options of windows, which pairs are not.
_OF_WINDOWS = ("stride", "pad_articles", "separate_articles", "noise", "val_split", "min_length", "estimate", "fsdp")


@dataclass(frozen=True)
class RunData:
    """The data of a run.

    Attributes:
        windows: To train on; `Pairs` for an encoder-decoder.
        validation: To be judged on; None for nothing.
        identity: Of the training data.
        description: A line about them.
        facts: For the run's record.
    """

    windows: Windows
    validation: EvaluationWindows | Pairs | None
    identity: DataIdentity
    description: str
    facts: Mapping[str, Any]


def require_options_of_pairs(request: RunRequest) -> None:
    """Refuse options that mean nothing for pairs.

    Raises:
        InputError: One was given on the command line.
    """
    for name in _OF_WINDOWS:
        if name in request.given and getattr(request.arguments, name):
            raise InputError(f"--{name} does not go with --task seq2seq, which trains on pairs; leave it out")


def prepare_data(request: RunRequest, tokenizer: PreTrainedTokenizerFast, reporter: Reporter, length: int) -> RunData:
    """Read and tokenise what a run needs.

    Args:
        request: The run's options.
        tokenizer: Of the run.
        reporter: Told of it.
        length: Tokens of a window, or of the longest source or target.

    Raises:
        InputError: If the data cannot be used.
    """
    if request.arguments.task == "seq2seq":
        return _pairs(request, tokenizer, reporter, length)
    return _windows(request, tokenizer, reporter, length)


def _windows(request: RunRequest, tokenizer: PreTrainedTokenizerFast, reporter: Reporter, length: int) -> RunData:
    arguments = request.arguments
    stream, index = prepare_training_stream(request, tokenizer, reporter)
    held_out = prepare_validation_stream(request, tokenizer, reporter)
    stride = arguments.stride or length
    windows: Windows = TokenWindows(stream, length, stride)
    if arguments.pad_articles:
        windows = ArticleWindows(stream, length, stride, tokenizer.pad_token_id)
    return RunData(
        windows=windows,
        validation=None if held_out is None else EvaluationWindows(held_out, length),
        identity=DataIdentity(
            len(stream),
            index.identity,
            windows.length,
            windows.stride,
            arguments.seed,
            arguments.pad_articles,
            arguments.task,
        ),
        description=f"windows: {len(windows):,} per epoch, {'at most ' if arguments.pad_articles else ''}"
        f"{windows.length:,} tokens each, one every {windows.stride:,} tokens",
        facts={
            **{source.path: f"sha256 {source.sha256}" for source in index.sources},
            "articles": index.num_articles,
            "tokens": index.num_tokens,
            "windows": len(windows),
            "window_tokens": windows.length,
            "stride": windows.stride,
        },
    )


def _pairs(request: RunRequest, tokenizer: PreTrainedTokenizerFast, reporter: Reporter, length: int) -> RunData:
    arguments = request.arguments

    def read(paths: tuple[str, ...]) -> Pairs:
        return read_pairs(
            paths,
            tokenizer,
            source_field=arguments.source_field,
            target_field=arguments.target_field,
            encoding=arguments.encoding,
            longest=length,
        )

    pairs = read(arguments.raw_data_path)
    validation = None if arguments.val_data_path is None else read(arguments.val_data_path)
    if validation is None:
        reporter.warn("no validation pairs; give some with --val_data_path")
    return RunData(
        windows=pairs,
        validation=validation,
        # Pairs are as long as they are: the longest allowed one does not change them.
        identity=DataIdentity(pairs.num_tokens, pairs.digest, 0, 0, arguments.seed, task=arguments.task),
        description=f"pairs: {len(pairs):,} per epoch, sources of up to {max(map(len, pairs.sources)):,} tokens, "
        f"targets of up to {pairs.length:,}",
        facts={
            **{path: f"{count} pairs" for path, count in pairs.files},
            "sha256 of the tokens": pairs.digest,
            "pairs": len(pairs),
            "tokens": pairs.num_tokens,
        },
    )
