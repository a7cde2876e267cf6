"""The command line of predict.py."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from reformer_lm.command_line import CommandLineParser
from reformer_lm.corpus.files import ENCODINGS
from reformer_lm.errors import InputError
from reformer_lm.generation import GenerationSettings
from reformer_lm.prediction.result_file import require_output
from reformer_lm.scoring.batches import TOKENS_PER_BATCH

TRAINING_COMMAND = "python train_reformer.py --raw --epochs 2 --model_config configs/tiny.json"
# Python's and torch's generators take larger seeds, but this range survives JSON readers that use doubles.
LARGEST_SEED = 2**53 - 1
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")

EXAMPLES = """\
examples:
  predict.py --text 春天来了 --length 100 --nsamples 3
  predict.py --unconditional --seed 7
  predict.py --ppl --text 他把书放在桌上。 --text 他把桌上放在书。
  predict.py --ppl --file sentences.jsonl --json
  predict.py --ppl --file sentences.jsonl --output scores.csv --sort descending --html report.html
  predict.py --ppl --compare 他把门轻轻关上。 他把轻门轻关上。
  predict.py --ppl --explain --text 他把轻门轻关上。
  predict.py --interactive
"""


def build_parser() -> CommandLineParser:
    """The parser of predict.py."""
    defaults = {field.name: field.default for field in fields(GenerationSettings)}
    parser = CommandLineParser(
        prog="predict.py",
        description="Generate text with a trained model, or with --ppl score how fluent it finds texts.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        bare_argument_hint="a text is given as --text {word}",
    )
    texts = parser.add_argument_group("texts (prompts, or sentences to score)")
    texts.add_argument("--text", "--prefix", action="append", default=[], help="a text; may be repeated")
    texts.add_argument(
        "--file",
        metavar="PATH",
        help='.txt: a text a line; .json: a list of strings; .jsonl: {"text": ...} a line; .csv, .tsv: a column; '
        ".parquet; all but that also as .gz; -: lines of stdin",
    )
    texts.add_argument(
        "--field", "--text_field", default="text", metavar="NAME", help="field of a .jsonl line (%(default)s)"
    )
    texts.add_argument(
        "--column",
        default="text",
        metavar="NAME",
        help="column of a .csv or .tsv: its name in the first row; its number where there is no such row (%(default)s)",
    )
    texts.add_argument("--encoding", choices=ENCODINGS, default="utf-8", help="of the file (%(default)s)")
    texts.add_argument("--unconditional", action="store_true", help="generate articles from nothing")
    texts.add_argument(
        "--interactive",
        action="store_true",
        help="write a text in turns: each line goes on with it, then the model does; /new begins another, an empty "
        "line ends (with --ppl: score one line after the other)",
    )

    job = parser.add_argument_group("job and output")
    job.add_argument("--ppl", action="store_true", help="score the texts instead: perplexity, tokens, text")
    job.add_argument("--model_dir", type=Path, default=Path("model"), metavar="DIR", help="trained model (model/)")
    job.add_argument("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda, or its number")
    job.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="number format of the weights; auto: as saved, float32 at least on a CPU. bfloat16 is faster where the "
        "processor has it, and moves a PPL by some thousandths, rarely by hundredths",
    )
    job.add_argument(
        "--batch_size",
        type=_integer(1),
        metavar="N",
        help="most texts that go through the model together (8 when generating; when scoring as many as fit)",
    )
    job.add_argument("--json", action="store_true", help="one JSON object a line")
    job.add_argument("--quiet", action="store_true", help="print only results (and warnings)")

    scoring = parser.add_argument_group("scoring (--ppl)")
    scoring.add_argument(
        "--compare", nargs=2, default=[], metavar=("A", "B"), help="which of two texts is more fluent, and where"
    )
    scoring.add_argument(
        "--explain", action="store_true", help="tint each character by its surprise, and say what was expected instead"
    )
    scoring.add_argument("--html", type=Path, metavar="PATH", help="write a page: heat maps, histogram, worst passages")
    scoring.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="write results to a .jsonl, .csv or .tsv file; the same command goes on with an interrupted run",
    )
    scoring.add_argument("--sort", choices=("ascending", "descending"), help="by PPL; ascending: the most fluent first")
    scoring.add_argument("--threshold", type=_positive_number, metavar="X", help="only texts with a PPL of at most X")
    scoring.add_argument("--invert", action="store_true", help="with --threshold: only the others")
    scoring.add_argument("--add_eos", action="store_true", help="score the end of the article, too")
    scoring.add_argument(
        "--context",
        type=_integer(1),
        metavar="N",
        help="texts longer than the model's window: tokens that a further window reads before its first scored token "
        "(half of the window)",
    )
    scoring.add_argument(
        "--stride", type=_integer(1), metavar="N", help="the same said otherwise: tokens that a further window scores"
    )
    scoring.add_argument(
        "--batch_tokens",
        type=_integer(1),
        default=TOKENS_PER_BATCH,
        metavar="N",
        help="most tokens that go through the model together, padding included (%(default)s)",
    )

    generation = parser.add_argument_group("generation")
    generation.add_argument(
        "--length",
        type=_integer(1),
        default=defaults["length"],
        metavar="N",
        help="most new tokens, about one a character (%(default)s)",
    )
    generation.add_argument(
        "--nsamples", type=_integer(1), default=1, metavar="N", help="samples of each prompt (%(default)s)"
    )
    generation.add_argument(
        "--temperature",
        type=_positive_number,
        default=defaults["temperature"],
        metavar="X",
        help="below 1: safer text, above 1: bolder text (%(default)s)",
    )
    generation.add_argument(
        "--top_k",
        "--topk",
        type=_integer(0),
        default=defaults["top_k"],
        metavar="N",
        help="draw from the N likeliest tokens; 1: always the likeliest, 0: from all (%(default)s)",
    )
    generation.add_argument(
        "--top_p",
        "--topp",
        type=_share,
        default=defaults["top_p"],
        metavar="P",
        help="draw from the likeliest tokens that share this probability; 1: from all (%(default)s)",
    )
    generation.add_argument(
        "--repetition_penalty",
        type=_positive_number,
        default=defaults["repetition_penalty"],
        metavar="X",
        help="above 1: avoid tokens already used (%(default)s)",
    )
    generation.add_argument(
        "--min_p",
        type=_number_from_0_to_1,
        default=defaults["min_p"],
        metavar="P",
        help="leave out tokens less likely than this share of the likeliest; 0: none (%(default)s)",
    )
    generation.add_argument(
        "--typical_p",
        type=_share,
        default=defaults["typical_p"],
        metavar="P",
        help="draw from the tokens of the most typical surprisal that share this probability; 1: all (%(default)s)",
    )
    generation.add_argument(
        "--no_repeat_ngram",
        type=_integer(0),
        default=defaults["no_repeat_ngram"],
        metavar="N",
        help="no run of N tokens comes twice; 0: no such rule (%(default)s)",
    )
    generation.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end a sample before this text; may be repeated",
    )
    generation.add_argument(
        "--overflow",
        choices=("error", "slide"),
        default=defaults["overflow"],
        help="where text and length exceed the longest sequence of the model: refuse, or go on from its last half "
        "whenever it is full (%(default)s)",
    )
    generation.add_argument(
        "--seed",
        type=_integer(0, LARGEST_SEED),
        metavar="N",
        help="the same seed gives the same text (a random one, which is printed)",
    )
    return parser


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line of predict.py.

    Args:
        argv: The arguments; None for the program's own.

    Returns:
        The values by name.

    Raises:
        InputError: If an option is unknown, a value is wrong, or options contradict each other.
    """
    arguments = build_parser().parse_strictly(argv)
    has_texts = bool(arguments.text) or arguments.file is not None
    _check_scoring(arguments)
    sources = [
        name
        for name, given in (
            ("--text or --file", has_texts),
            ("--compare", bool(arguments.compare)),
            ("--unconditional", arguments.unconditional),
            ("--interactive", arguments.interactive),
        )
        if given
    ]
    if len(sources) > 1:
        raise InputError(f"{' and '.join(sources)} exclude each other; give one of them")
    if arguments.ppl and arguments.unconditional:
        raise InputError("--ppl scores texts, so --unconditional leaves nothing to score; give --text or --file")
    if arguments.interactive and not arguments.ppl and arguments.nsamples > 1:
        raise InputError("--interactive writes one text; give --nsamples 1, or --text or --file for several samples")
    if not sources:
        wanted = "--text, --file or --interactive"
        raise InputError(f"no text; give {wanted if arguments.ppl else '--unconditional, ' + wanted}")
    if arguments.invert and arguments.threshold is None:
        raise InputError("--invert turns --threshold around; give --threshold X, too")
    return arguments


def _check_scoring(arguments: argparse.Namespace) -> None:
    """Refuse options of scoring where nothing is scored, or only a text or two."""
    given = [
        name
        for name in ("compare", "explain", "html", "output", "sort", "threshold", "add_eos", "context", "stride")
        if getattr(arguments, name) not in (None, False, [])
    ]
    if given and not arguments.ppl:
        raise InputError(f"--{given[0]} belongs to scoring; give --ppl, too")
    alone = [name for name in given if name in ("html", "output", "sort", "threshold")]
    if alone and (arguments.compare or arguments.interactive):
        other = "--compare" if arguments.compare else "--interactive"
        raise InputError(f"--{alone[0]} does not go with {other}; give --text or --file")
    if arguments.output is not None:
        require_output(arguments.output)
        if arguments.explain and arguments.output.suffix.lower() != ".jsonl":
            raise InputError(f"--explain needs more than a table holds; give --output {arguments.output.stem}.jsonl")
    if arguments.html is not None and not arguments.html.absolute().parent.is_dir():
        raise InputError(f"--html {arguments.html}: there is no folder {arguments.html.parent}; make it first")


def _integer(smallest: int, largest: int | None = None) -> Callable[[str], int]:
    wanted = f"an integer of at least {smallest}" if largest is None else f"an integer from {smallest} to {largest}"

    def convert(word: str) -> int:
        try:
            value = int(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {word!r}") from None
        if value < smallest or (largest is not None and value > largest):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {word}")
        return value

    return convert


def _number(word: str, wanted: str, allowed: Callable[[float], bool]) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and allowed(value)):
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {word!r}")
    return value


def _positive_number(word: str) -> float:
    return _number(word, "a number greater than 0", lambda value: value > 0)


def _number_from_0_to_1(word: str) -> float:
    return _number(word, "a number from 0 to 1", lambda value: 0 <= value <= 1)


def _share(word: str) -> float:
    return _number(word, "a number greater than 0 and at most 1", lambda value: 0 < value <= 1)
