"""Builds vocabularies: `python -m reformer_lm.text.vocabulary`.

Without arguments it writes the default vocabulary, `default_vocab.txt`, which depends on this code
and Python's gb2312 codec only. With `--corpus` it learns one:

    python -m reformer_lm.text.vocabulary --corpus data/train.json --output vocab.txt
    python -m reformer_lm.text.vocabulary --corpus data/train.json --segment --output words/
    python -m reformer_lm.text.vocabulary --corpus data/train.json --bpe_token --vocab_size 8000 --output bpe/

Each result is what `load_tokenizer` and `--tokenizer_path` take.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from reformer_lm.command_line import EXIT_INTERRUPTED, EXIT_OK, EXIT_WRONG_INPUT, CommandLineParser, complain
from reformer_lm.errors import InputError
from reformer_lm.text.characters import hanzi, wordpiece_base
from reformer_lm.text.conventions import DEFAULT_VOCABULARY
from reformer_lm.text.learning import learn_bpe, learn_characters, learn_words
from reformer_lm.text.tokenizer import wrap_backend


def default_vocabulary() -> list[str]:
    """The tokens of the default vocabulary in the order of their ids."""
    return [*wordpiece_base(), *hanzi()]


def write_vocabulary(tokens: Sequence[str], path: Path) -> None:
    """Writes a vocab.txt: UTF-8, LF, one token a line.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes("".join(f"{token}\n" for token in tokens).encode("utf-8"))
    except OSError as error:
        raise InputError(f"cannot write the vocabulary {path}: {error.strerror}") from error


@dataclass(frozen=True)
class CorpusFiles:
    """The articles of some files, which can be read more than once."""

    paths: Sequence[Path]

    def __iter__(self) -> Iterator[str]:
        """Reads all files again, one after the other."""
        # Only here does text need the corpus readers, which themselves know tokenizers from this package.
        from reformer_lm.corpus.readers import read_articles

        for path in self.paths:
            yield from read_articles(path)


def build_parser() -> CommandLineParser:
    """The command line."""
    parser = CommandLineParser(
        prog="python -m reformer_lm.text.vocabulary",
        bare_argument_hint="files are given behind --corpus",
        description="Write the default vocabulary, or learn one from a corpus.",
    )
    parser.add_argument(
        "--corpus",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="files of articles: a JSON array of strings, .jsonl or .txt",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="the vocab.txt to write; with --segment or --bpe_token the tokenizer folder "
        "(default: the package's default vocabulary; needed with --corpus)",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--segment", action="store_true", help="word level: words as jieba segments them")
    kind.add_argument("--bpe_token", action="store_true", help="byte pair encoding over characters")
    parser.add_argument(
        "--vocab_size",
        type=int,
        help="the most tokens to have (default: 30000 for --segment, 16000 for --bpe_token, else all characters)",
    )
    parser.add_argument(
        "--min_frequency",
        type=int,
        help="how often a token must occur (default: 2 for --segment and --bpe_token, else 1)",
    )
    parser.add_argument(
        "--keep_case",
        action="store_true",
        help="do not lower-case; a vocab.txt needs it again when it is loaded",
    )
    return parser


def build(arguments: argparse.Namespace) -> str:
    """Does what the command line says and returns one line that tells what was written.

    Raises:
        InputError: arguments that do not go together, an unreadable corpus, an output that cannot be written.
    """
    learning = {
        name: getattr(arguments, name)
        for name in ("vocab_size", "min_frequency")
        if getattr(arguments, name) is not None
    }
    for name, value in learning.items():
        if value < 1:
            raise InputError(f"--{name} must be at least 1, not {value}")
    output: Path | None = arguments.output
    if arguments.corpus is None:
        if learning or arguments.segment or arguments.bpe_token or arguments.keep_case:
            raise InputError("learning a vocabulary needs text: give files with --corpus")
        tokens = default_vocabulary()
        write_vocabulary(tokens, output or DEFAULT_VOCABULARY)
        return f"wrote {output or DEFAULT_VOCABULARY}: {len(tokens):,} tokens"
    if output is None:
        raise InputError("say where to write with --output")
    articles = CorpusFiles(arguments.corpus)
    if not (arguments.segment or arguments.bpe_token):
        if output.is_dir():
            raise InputError(f"--output {output} is a folder; a character vocabulary is a file: vocab.txt")
        tokens = learn_characters(articles, keep_case=arguments.keep_case, **learning)
        write_vocabulary(tokens, output)
        return f"wrote {output}: {len(tokens):,} tokens"
    if output.is_file() or output.suffix in (".txt", ".json"):
        raise InputError(f"--output {output} must be a folder: scores and merges do not fit into a vocab.txt")
    learn = learn_words if arguments.segment else learn_bpe
    tokenizer = wrap_backend(learn(articles, keep_case=arguments.keep_case, **learning))
    try:
        output.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(output)
    except OSError as error:
        raise InputError(f"cannot write the tokenizer folder {output}: {error.strerror}") from error
    return f"wrote {output}: {len(tokenizer):,} tokens"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    try:
        print(build(build_parser().parse_strictly(arguments)))
    except InputError as error:
        complain(error)
        return EXIT_WRONG_INPUT
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
