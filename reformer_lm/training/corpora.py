"""The token streams of a run: tokenised now, or reused from an earlier run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from reformer_lm.corpus import (
    CorpusSource,
    Reading,
    ShardIndex,
    TokenStream,
    build_shards,
    choose_workers,
    find_files,
    find_leaks,
    load_shards,
    read_index,
)
from reformer_lm.corpus.sources import TOKEN_IDS
from reformer_lm.corpus.token_files import find_tokenized_files
from reformer_lm.errors import InputError
from reformer_lm.text import tokenizer_fingerprint
from reformer_lm.training.arguments import DEFAULT_VALIDATION, RunRequest, TrainingArguments
from reformer_lm.training.reporting import Reporter

# Below tokenized_data_path, so that no corpus replaces another.
TRAINING_FOLDER = "train"
VALIDATION_FOLDER = "validation"
SPLIT_FOLDER = "validation_split"

# Of a corpus of many.
FILES_NAMED = 3
# What a note about leaked articles shows of them.
LEAKS_SHOWN = 3
TOKENS_SHOWN = 20


def prepare_training_stream(
    request: RunRequest, tokenizer: PreTrainedTokenizerFast, reporter: Reporter
) -> tuple[TokenStream, ShardIndex]:
    """The training corpus as tokens.

    With --raw it is tokenised, unless the shards at hand already are what tokenising would give; without, the
    shards at hand are used, and must match what the user said. Where there are none, the files that GPT2-Chinese
    has tokenised are taken.

    Raises:
        InputError: If the corpus is unusable, or there are no matching shards and --raw was not given.
    """
    arguments = request.arguments
    directory = Path(arguments.tokenized_data_path) / TRAINING_FOLDER
    source = None
    if arguments.raw:
        source = CorpusSource(arguments.raw_data_path, _reading(arguments), tokenizer.bos_token_id)
    else:
        files = _files_of_gpt2_chinese(request, directory)
        if files:
            source = CorpusSource(files, Reading(txt_articles=TOKEN_IDS), tokenizer.bos_token_id)
    if source is not None:
        stream, index = _reuse_or_build(source, directory, tokenizer, reporter, arguments, for_training=True)
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

    To be called after `prepare_training_stream`, which also makes the validation corpus of a split.

    Raises:
        InputError: If the files are unusable.
    """
    arguments = request.arguments
    root = Path(arguments.tokenized_data_path)
    training = read_index(root / TRAINING_FOLDER)
    if training.val_split and arguments.val_data_path is None:
        directory = root / SPLIT_FOLDER
        stream, index = load_shards(directory, tokenizer_fingerprint(tokenizer)), read_index(directory)
    else:
        paths = arguments.val_data_path
        if paths is None:
            if not Path(DEFAULT_VALIDATION).is_file():
                reporter.warn(f"no validation corpus (no {DEFAULT_VALIDATION}); give one with --val_data_path")
                return None
            paths = (DEFAULT_VALIDATION,)
        directory = root / VALIDATION_FOLDER
        source = CorpusSource(paths, _reading(arguments), tokenizer.bos_token_id)
        stream, index = _reuse_or_build(source, directory, tokenizer, reporter, arguments, for_training=False)
    _describe("validation", index, tokenizer, reporter)
    _warn_of_leaks(root / TRAINING_FOLDER, directory, stream, tokenizer, reporter)
    return stream


def _reading(arguments: TrainingArguments) -> Reading:
    return Reading(arguments.text_field, arguments.txt_articles, arguments.encoding)


def _files_of_gpt2_chinese(request: RunRequest, directory: Path) -> list[Path]:
    """GPT2-Chinese's tokenised files, where there are no shards of anything else."""
    files = find_tokenized_files(Path(request.arguments.tokenized_data_path))
    if not files:
        return []
    try:
        if read_index(directory).reading.txt_articles != TOKEN_IDS:
            return []
    except InputError:
        # Missing, or damaged: made anew in either case.
        pass
    wanted = request.arguments.num_pieces
    if "num_pieces" in _explicit(request) and wanted != len(files):
        raise InputError(
            f"{request.arguments.tokenized_data_path}: holds {len(files)} files such as {files[0].name}, not "
            f"--num_pieces {wanted}; bring the others back or leave --num_pieces out"
        )
    return files


def _reuse_or_build(
    source: CorpusSource,
    directory: Path,
    tokenizer: PreTrainedTokenizerFast,
    reporter: Reporter,
    arguments: TrainingArguments,
    *,
    for_training: bool,
) -> tuple[TokenStream, ShardIndex]:
    # Every article of a validation corpus is scored, however short.
    num_pieces, min_length = (arguments.num_pieces, arguments.min_length) if for_training else (1, 0)
    val_split = arguments.val_split if for_training else 0.0
    split_directory = directory.with_name(SPLIT_FOLDER) if val_split else None
    fingerprint = tokenizer_fingerprint(tokenizer)
    try:
        index = read_index(directory)
        if (
            (index.min_length, index.val_split, index.reading) == (min_length, val_split, source.reading)
            and len(index.shards) == min(num_pieces, index.num_articles)
            and _are_described(source.files, index)
        ):
            stream = load_shards(directory, fingerprint)
            if split_directory is not None:
                load_shards(split_directory, fingerprint)
                _require_other_side(read_index(split_directory), index, split_directory)
            reporter.line(f"{source.name}: already tokenised, reusing {directory}")
            return stream, index
    except InputError:
        # Missing, damaged or of another tokenizer: exactly what tokenising anew is for.
        pass
    reporter.line(f"{source.name}: tokenising into {directory}")
    try:
        index = build_shards(
            source,
            tokenizer,
            directory,
            num_pieces,
            min_length,
            val_split=val_split,
            validation_directory=split_directory,
            workers=arguments.workers or choose_workers(source.size),
            show_progress=not reporter.quiet and sys.stderr.isatty(),
            on_resume=lambda articles: reporter.line(
                f"{source.name}: continuing behind {articles:,} articles that an interrupted run has tokenised"
            ),
        )
    except KeyboardInterrupt:
        reporter.warn("interrupted; what has been tokenised is kept, and the same command continues it")
        raise
    return load_shards(directory, fingerprint, verify=False), index


def _are_described(files: Sequence[Path], index: ShardIndex) -> bool:
    return len(files) == len(index.sources) and all(
        described.describes(path) for path, described in zip(files, index.sources, strict=True)
    )


def _require_other_side(validation: ShardIndex, training: ShardIndex, directory: Path) -> None:
    """Refuse validation articles that another split than the training's left."""
    same = (validation.val_split, validation.sources) == (training.val_split, training.sources)
    if not same or not validation.is_validation:
        raise InputError(f"{directory}: not of the same split as the training tokens; run again with --raw")


def _explicit(request: RunRequest) -> set[str]:
    """Names of the options that the user gave, on the command line or in the configuration file."""
    return set(request.given) | (set(request.config_file.training) if request.config_file else set())


def _require_requested(request: RunRequest, index: ShardIndex, directory: Path) -> None:
    """Refuse shards that are not of the corpus or settings that the user asked for."""
    arguments = request.arguments
    explicit = _explicit(request)
    for name, made_with in (
        ("min_length", index.min_length),
        ("val_split", index.val_split),
        ("text_field", index.reading.text_field),
        ("txt_articles", index.reading.txt_articles),
        ("encoding", index.reading.encoding),
    ):
        if name in explicit and getattr(arguments, name) != made_with:
            raise InputError(
                f"{directory}: tokenised with --{name} {made_with}, not {getattr(arguments, name)}; "
                "run again with --raw to tokenise the corpus anew"
            )
    # Who names no corpus means the one that the shards are of.
    known = [Path(source.path) for source in index.sources]
    files = find_files(arguments.raw_data_path) if "raw_data_path" in explicit else known
    for path, source in zip_longest(files, index.sources):
        # A file that is gone cannot have changed.
        if path is None or source is None or (path.exists() and not source.describes(path)):
            tokenised = ", ".join(source.path for source in index.sources[:FILES_NAMED])
            raise InputError(
                f"{directory}: the tokens are of {tokenised} as it was then, not of "
                f"{path or ' '.join(arguments.raw_data_path)} as it is now; run again with --raw to tokenise it anew"
            )


def _describe(name: str, index: ShardIndex, tokenizer: PreTrainedTokenizerFast, reporter: Reporter) -> None:
    dropped = ""
    if index.num_dropped and not index.is_validation:
        too_short = f"of {index.min_length} characters or fewer" if index.min_length else "empty"
        dropped = f"; {index.num_dropped:,} {too_short} left out"
    reporter.line(
        f"{name}: {index.num_articles:,} articles, {index.num_tokens:,} tokens, "
        f"{index.unknown_share:.2%} [UNK]{dropped}"
    )
    message = index.unknown_message(tokenizer)
    if message:
        reporter.warn(f"{name}: {message}")


def _warn_of_leaks(
    training: Path, validation: Path, stream: TokenStream, tokenizer: PreTrainedTokenizerFast, reporter: Reporter
) -> None:
    """Say which validation articles the model is trained on."""
    leaks = find_leaks(training, validation)
    if not leaks.articles:
        return
    beginnings = []
    for article in leaks.articles[:LEAKS_SHOWN]:
        start = stream.article_start(article)
        ids = stream.read(start, min(start + 1 + TOKENS_SHOWN, len(stream)))
        beginnings.append(" ".join(tokenizer.decode(ids.tolist(), skip_special_tokens=True).split())[:TOKENS_SHOWN])
    shown = ", ".join(f"{beginning!r}" for beginning in beginnings)
    more = ", ..." if len(leaks.articles) > LEAKS_SHOWN else ""
    reporter.warn(
        f"{len(leaks.articles):,} of {leaks.num_articles:,} validation articles also stand in the training text, so "
        f"their perplexity says too much good of the model: {shown}{more}; take them out of one of the two"
    )
