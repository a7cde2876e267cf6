"""The token streams of a run: tokenised now, or reused from an earlier run."""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from reformer_lm.corpus import (
    ShardIndex,
    SourceFile,
    TokenStream,
    build_shards,
    fingerprint_source,
    load_shards,
    read_articles,
    read_index,
)
from reformer_lm.errors import InputError
from reformer_lm.text import tokenizer_fingerprint
from reformer_lm.training.arguments import DEFAULT_VALIDATION, RunRequest
from reformer_lm.training.reporting import Reporter

# Below tokenized_data_path, so that the two corpora never replace each other.
TRAINING_FOLDER = "train"
VALIDATION_FOLDER = "validation"


def prepare_training_stream(
    request: RunRequest, tokenizer: PreTrainedTokenizerFast, reporter: Reporter
) -> tuple[TokenStream, ShardIndex]:
    """The training corpus as tokens.

    With --raw it is tokenised, unless the shards at hand already are what tokenising would give; without, the
    shards at hand are used, and must match what the user said.

    Raises:
        InputError: If the corpus is unusable, or there are no matching shards and --raw was not given.
    """
    arguments = request.arguments
    directory = Path(arguments.tokenized_data_path) / TRAINING_FOLDER
    if arguments.raw:
        stream, index = _reuse_or_build(
            Path(arguments.raw_data_path),
            directory,
            tokenizer,
            reporter,
            num_pieces=arguments.num_pieces,
            min_length=arguments.min_length,
        )
    else:
        index = read_index(directory)
        stream = load_shards(directory, tokenizer_fingerprint(tokenizer))
        _require_requested(request, index, directory)
        reporter.line(f"corpus: reusing the tokens in {directory}")
    _describe("corpus", index, tokenizer, reporter)
    return stream, index


def prepare_validation_stream(
    request: RunRequest, tokenizer: PreTrainedTokenizerFast, reporter: Reporter
) -> TokenStream | None:
    """The validation corpus as tokens, tokenised whenever it changed; None if there is none.

    Raises:
        InputError: If the file is unusable.
    """
    path = request.arguments.val_data_path
    if path is None:
        if not Path(DEFAULT_VALIDATION).is_file():
            reporter.warn(f"no validation corpus (no {DEFAULT_VALIDATION}); give one with --val_data_path")
            return None
        path = DEFAULT_VALIDATION
    directory = Path(request.arguments.tokenized_data_path) / VALIDATION_FOLDER
    # Every article is scored, however short.
    stream, index = _reuse_or_build(Path(path), directory, tokenizer, reporter, num_pieces=1, min_length=0)
    _describe("validation", index, tokenizer, reporter)
    return stream


def _reuse_or_build(
    path: Path,
    directory: Path,
    tokenizer: PreTrainedTokenizerFast,
    reporter: Reporter,
    *,
    num_pieces: int,
    min_length: int,
) -> tuple[TokenStream, ShardIndex]:
    fingerprint = tokenizer_fingerprint(tokenizer)
    articles = read_articles(path)
    source = fingerprint_source(path)
    try:
        index = read_index(directory)
        if (
            [known.sha256 for known in index.sources] == [source.sha256]
            and index.min_length == min_length
            and len(index.shards) == min(num_pieces, index.num_articles)
        ):
            stream = load_shards(directory, fingerprint)
            reporter.line(f"{path}: already tokenised, reusing {directory}")
            return stream, index
    except InputError:
        # Missing, damaged or of another tokenizer: exactly what tokenising anew is for.
        pass
    reporter.line(f"{path}: tokenising into {directory}")
    show_progress = not reporter.quiet and sys.stderr.isatty()
    index = build_shards(
        articles, tokenizer, directory, num_pieces, min_length, sources=[source], show_progress=show_progress
    )
    return load_shards(directory, fingerprint, verify=False), index


def _require_requested(request: RunRequest, index: ShardIndex, directory: Path) -> None:
    """Refuse shards that are not of the corpus or settings that the user asked for."""
    arguments = request.arguments
    explicit = request.given | (request.config_file.training.keys() if request.config_file else set())
    if "min_length" in explicit and arguments.min_length != index.min_length:
        raise InputError(
            f"{directory}: tokenised with --min_length {index.min_length}, not {arguments.min_length}; "
            "run again with --raw to tokenise the corpus anew"
        )
    # Who names no corpus means the one that the shards are of.
    paths = [arguments.raw_data_path] if "raw_data_path" in explicit else [source.path for source in index.sources]
    for path in paths:
        if Path(path).is_file() and not any(_is_unchanged(Path(path), source) for source in index.sources):
            tokenised = ", ".join(source.path for source in index.sources)
            raise InputError(
                f"{directory}: the tokens are of {tokenised} as it was then, not of {path} as it is now; "
                "run again with --raw to tokenise it anew"
            )


def _is_unchanged(path: Path, source: SourceFile) -> bool:
    status = path.stat()
    if status.st_size != source.size:
        return False
    return status.st_mtime_ns == source.modified_ns or fingerprint_source(path).sha256 == source.sha256


def _describe(name: str, index: ShardIndex, tokenizer: PreTrainedTokenizerFast, reporter: Reporter) -> None:
    dropped = ""
    if index.num_dropped:
        too_short = f"of {index.min_length} characters or fewer" if index.min_length else "empty"
        dropped = f"; {index.num_dropped:,} {too_short} left out"
    reporter.line(
        f"{name}: {index.num_articles:,} articles, {index.num_tokens:,} tokens, "
        f"{index.unknown_share:.2%} [UNK]{dropped}"
    )
    message = index.unknown_message(tokenizer)
    if message:
        reporter.warn(f"{name}: {message}")
