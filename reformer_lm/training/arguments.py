"""What a training run is asked to do: defaults, then a configuration file, then the command line.

Every option is one field of `TrainingArguments`; the command line, the configuration file's keys, the checks
and the help text all come from it, so that they cannot drift apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reformer_lm.command_line import CommandLineParser, nearest_name
from reformer_lm.corpus.files import ENCODINGS
from reformer_lm.corpus.readers import TXT_ARTICLES
from reformer_lm.errors import InputError
from reformer_lm.training.config_files import ConfigFile, read_config
from reformer_lm.training.optimization import OPTIMIZERS, SCHEDULES
from reformer_lm.training.trackers import TENSORBOARD, complaint_about

DEFAULT_MODEL_CONFIG = "configs/tiny.json"
DEFAULT_VALIDATION = "data/val.json"

TASKS = ("clm", "mlm", "seq2seq")

# Options that say how to start, not what to train: they make no sense in a configuration file.
COMMAND_LINE_ONLY = ("model_config", "resume", "restore", "estimate", "print_config")

Check = Callable[[Any], str | None]


def _at_least(minimum: float) -> Check:
    return lambda value: None if value >= minimum else f"it must be at least {minimum}"


def _above_zero(value: float) -> str | None:
    return None if value > 0 else "it must be greater than 0"


def _fraction(value: float) -> str | None:
    return None if 0 <= value <= 1 else "it must be from 0 to 1"


def _not_empty(value: str) -> str | None:
    return None if value.strip() else "it must not be empty"


def _below_one(value: float) -> str | None:
    return None if 0 <= value < 1 else "it must be at least 0 and less than 1"


def _one_of(choices: Sequence[str]) -> Check:
    return lambda value: None if value in choices else f"it must be one of {', '.join(choices)}"


def _regular_expression(value: str) -> str | None:
    try:
        re.compile(value)
    except re.error as error:
        return f"it must be a regular expression ({error})"
    return None


def _not_blank(value: str | tuple[str, ...]) -> str | None:
    names = (value,) if isinstance(value, str) else value
    return None if names and all(name.strip() for name in names) else "it must be a path"


def _option(default: Any, kind: type, text: str, *checks: Check) -> Any:
    return field(default=default, metadata={"kind": kind, "help": text, "checks": checks})


@dataclass(frozen=True)
class TrainingArguments:
    """All options of a training run; the help texts below say what each means. None is "not given"."""

    task: str = _option(
        "clm",
        str,
        "clm: predict the next token; mlm: fill in masked ones; seq2seq: write a target for a source",
        _one_of(TASKS),
    )
    mlm_probability: float = _option(
        0.15, float, "mlm: share of the tokens that are to be filled in", _above_zero, _fraction
    )
    raw: bool = _option(False, bool, "tokenise raw_data_path first; without it, earlier token shards are used")
    raw_data_path: tuple[str, ...] = _option(
        ("data/train.json",),
        tuple,
        "training corpus: .json, .jsonl, .txt, .parquet, .npz, folders, patterns",
        _not_blank,
    )
    val_data_path: tuple[str, ...] | None = _option(
        None, tuple, f"validation corpus ({DEFAULT_VALIDATION} if that exists)", _not_blank
    )
    val_split: float = _option(0.0, float, "share of the training articles to validate with instead", _below_one)
    text_field: str = _option("text", str, "field of .jsonl, column of .parquet that holds the text", _not_empty)
    source_field: str = _option("source", str, "seq2seq: field of .jsonl that holds the source", _not_empty)
    target_field: str = _option("target", str, "seq2seq: field of .jsonl that holds the target", _not_empty)
    txt_articles: str = _option(
        "blank", str, "articles of .txt files: between blank lines, one a line, or one a file", _one_of(TXT_ARTICLES)
    )
    encoding: str = _option("utf-8", str, "of text files: " + ", ".join(ENCODINGS), _one_of(ENCODINGS))
    workers: int | None = _option(None, int, "processes that tokenise (as many as cores, if worth it)", _at_least(1))
    tokenized_data_path: str = _option("data/tokenized/", str, "folder of the token shards", _not_blank)
    num_pieces: int = _option(8, int, "number of token shards", _at_least(1))
    min_length: int = _option(0, int, "leave out articles of this many characters or fewer", _at_least(0))
    tokenizer_path: str | None = _option(None, str, "vocab.txt, tokenizer folder or hub name (built-in vocabulary)")
    segment: bool = _option(False, bool, "word level: cut words with jieba; needs a vocabulary of words")
    bpe_token: bool = _option(False, bool, "byte-pair encoding; needs a --tokenizer_path built that way")
    keep_case: bool = _option(False, bool, "keep upper and lower case apart")
    model_config: str | None = _option(
        None, str, f"JSON file with the model's size and training defaults ({DEFAULT_MODEL_CONFIG})"
    )
    init_from: str | None = _option(None, str, "folder of a trained model whose weights to start from (fine-tuning)")
    pretrained_model: str | None = _option(None, str, "GPT2-Chinese's name of init_from")
    train_only: str | None = _option(
        None, str, "train only parameters whose names match this regular expression", _regular_expression
    )
    epochs: int = _option(5, int, "times to go through the corpus", _at_least(1))
    max_steps: int | None = _option(None, int, "stop after this many optimizer steps", _at_least(1))
    batch_size: int = _option(8, int, "windows in a batch", _at_least(1))
    gradient_accumulation: int = _option(1, int, "batches to an optimizer step", _at_least(1))
    max_seq_len: int | None = _option(None, int, "tokens in a window (the model's maximum)", _at_least(2))
    stride: int | None = _option(None, int, "tokens from window to window (the window's length)", _at_least(1))
    pad_articles: bool = _option(False, bool, "a window holds one article only; short ones are padded")
    separate_articles: bool = _option(False, bool, "articles in one window do not see each other")
    lr: float = _option(3e-4, float, "highest learning rate", _above_zero)
    optimizer: str = _option("adamw", str, "one of " + ", ".join(OPTIMIZERS), _one_of(OPTIMIZERS))
    lr_schedule: str = _option("cosine", str, "decay of the learning rate: " + ", ".join(SCHEDULES), _one_of(SCHEDULES))
    lr_decay_share: float = _option(0.2, float, "share of the steps that wsd's decay takes", _fraction)
    warmup_steps: int | None = _option(
        None, int, "steps of rising learning rate (a tenth of all steps, at most 2000)", _at_least(0)
    )
    min_lr_ratio: float = _option(0.1, float, "the decay ends at this share of lr", _fraction)
    weight_decay: float = _option(0.1, float, "AdamW's weight decay on the matrices of linear layers", _at_least(0))
    max_grad_norm: float = _option(1.0, float, "clip the gradient's norm to this", _above_zero)
    noise: float = _option(0.0, float, "replace input tokens by random ones with this probability", _fraction)
    ema: float = _option(
        0.0, float, "decay of a moving average of the weights, which is then validated and saved (0: none)", _fraction
    )
    early_stopping: int = _option(
        0, int, "stop after so many validations without a new lowest loss (0: never)", _at_least(0)
    )
    fp16: bool = _option(False, bool, "half precision with loss scaling (CUDA only)")
    bf16: bool = _option(False, bool, "bfloat16 mixed precision")
    device: str | None = _option(
        None, str, "cpu, cuda, cuda:0, or a CUDA number as in GPT2-Chinese (cuda if there is one)"
    )
    fsdp: bool = _option(False, bool, "distribute the parameters over the processes of torchrun (FSDP2)")
    compile: bool = _option(False, bool, "torch.compile the layers; needs a C++ compiler on the CPU")
    seed: int = _option(42, int, "seed of initial weights, window order, dropout and samples", _at_least(0))
    log_step: int = _option(10, int, "report loss and speed every so many steps", _at_least(1))
    eval_every: int = _option(
        200, int, "validate every so many steps, besides start and end (0: only those)", _at_least(0)
    )
    save_every: int = _option(
        500, int, "save a checkpoint every so many steps, besides the end (0: only that)", _at_least(0)
    )
    save_total_limit: int = _option(2, int, "checkpoints that are kept, besides the best", _at_least(1))
    sample_every: int = _option(500, int, "write sample text every so many steps (0: never)", _at_least(0))
    output_dir: str = _option("model/", str, "folder for the trained model", _not_blank)
    writer_dir: str = _option("tensorboard_summary/", str, "folder for TensorBoard", _not_blank)
    resume: bool = _option(False, bool, "go on from the newest checkpoint in output_dir, exactly")
    restore: str | None = _option(
        None, str, "latest (resume, or start if there is nothing), fresh, or a checkpoint's folder to go on from"
    )
    estimate: bool = _option(False, bool, "say how much memory a step would take, and train nothing")
    report_to: tuple[str, ...] = _option(
        (TENSORBOARD,), tuple, "trackers, by accelerate's names, such as tensorboard wandb; or none", complaint_about
    )
    print_config: bool = _option(False, bool, "print the run's settings as a file for --model_config, train nothing")
    quiet: bool = _option(False, bool, "print only validation and the result")


FIELDS = {option.name: option for option in dataclasses.fields(TrainingArguments)}


@dataclass(frozen=True)
class RunRequest:
    """The outcome of parsing.

    Attributes:
        arguments: The resolved options.
        config_file: The configuration file that was read, None if there was none.
        given: Names of the options that came from the command line.
    """

    arguments: TrainingArguments
    config_file: ConfigFile | None
    given: frozenset[str]


def build_parser() -> CommandLineParser:
    """The command line's parser. It leaves values as strings and options that were not given out."""
    parser = CommandLineParser(
        prog="train_reformer.py",
        description="Train a Reformer language model on Chinese text.",
        epilog="Values come from the defaults, then the configuration file, then the command line. "
        "Every switch has a --no_ form, which overrules the file.",
        bare_argument_hint="every value belongs to a flag, see --help",
        argument_default=argparse.SUPPRESS,
    )
    for name, option in FIELDS.items():
        if option.metadata["kind"] is bool:
            parser.add_argument(f"--{name}", action="store_true", help=option.metadata["help"])
            parser.add_argument(f"--no_{name}", dest=name, action="store_false", help=argparse.SUPPRESS)
        else:
            is_list = option.metadata["kind"] is tuple
            shown: Any = option.default
            default = "" if shown is None else f" ({' '.join(shown) if isinstance(shown, tuple) else shown})"
            help_text = (option.metadata["help"] + default).replace("%", "%%")
            of_list = "PATH" if name.endswith("_path") else "NAME"
            metavar = of_list if is_list else option.metadata["kind"].__name__.upper()
            parser.add_argument(f"--{name}", metavar=metavar, help=help_text, nargs="+" if is_list else None)
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> RunRequest:
    """Resolve the options of a run.

    Args:
        argv: The command line without the program's name; ``sys.argv[1:]`` if None.

    Raises:
        InputError: On an unknown flag or key, a value of the wrong kind or out of range, or an unusable
            configuration file.
    """
    parser = build_parser()
    given = vars(parser.parse_strictly(argv))
    config_path = given.get("model_config")
    if config_path is None and Path(DEFAULT_MODEL_CONFIG).is_file():
        config_path = DEFAULT_MODEL_CONFIG
    config_file = None if config_path is None else read_config(config_path)

    values: dict[str, Any] = {}
    if config_file is not None:
        values = _values_of_file(config_file)
        # One precision is meant, and the command line's word is the last.
        if given.get("fp16") or given.get("bf16"):
            values.pop("fp16", None)
            values.pop("bf16", None)
    for name, value in given.items():
        values[name] = _checked(name, value, f"--{name}")
    arguments = TrainingArguments(**values)
    for one, other in (("fp16", "bf16"), ("val_split", "val_data_path"), ("pad_articles", "separate_articles")):
        if getattr(arguments, one) and getattr(arguments, other):
            raise InputError(f"--{one} and --{other} are both given; choose one")
    arguments = _one_name_each(arguments)
    return RunRequest(arguments, config_file, frozenset(given))


def _one_name_each(arguments: TrainingArguments) -> TrainingArguments:
    """Resolve options that have two names: afterwards init_from and restore say it all."""
    init_from, restore = arguments.init_from, arguments.restore
    if init_from and arguments.pretrained_model and init_from != arguments.pretrained_model:
        raise InputError("--init_from and --pretrained_model name two models; give one of them")
    if arguments.resume and restore not in (None, "latest"):
        raise InputError(f"--resume and --restore {restore} are both given; choose one")
    return dataclasses.replace(arguments, init_from=init_from or arguments.pretrained_model, pretrained_model=None)


def _values_of_file(config_file: ConfigFile) -> dict[str, Any]:
    known = [name for name in FIELDS if name not in COMMAND_LINE_ONLY]
    values = {}
    for key, value in config_file.training.items():
        if key in COMMAND_LINE_ONLY:
            raise InputError(f"{config_file.path}: training key {key!r} belongs on the command line (--{key})")
        if key not in FIELDS:
            raise InputError(
                f"{config_file.path}: unknown training key {key!r}; did you mean {nearest_name(key, known)!r}?"
            )
        if value is not None or FIELDS[key].default is not None:
            value = _checked(key, value, f"{config_file.path}: training key {key!r}")
        values[key] = value
    return values


def _checked(name: str, value: Any, origin: str) -> Any:
    """Convert a value of the command line (a string) or of a file (a JSON value), and check its range."""
    metadata: Mapping[str, Any] = FIELDS[name].metadata
    converted = _convert(value, metadata["kind"], origin)
    for check in metadata["checks"]:
        complaint = check(converted)
        if complaint:
            shown = " ".join(converted) if isinstance(converted, tuple) else value
            raise InputError(f"{origin} is {shown}; {complaint}")
    return converted


def _convert(value: Any, kind: type, origin: str) -> Any:
    if kind is bool or kind is str:
        if isinstance(value, kind):
            return value
        raise InputError(f"{origin} is {value!r}; it must be {'true or false' if kind is bool else 'a string'}")
    if kind is tuple:
        names = [value] if isinstance(value, str) else value
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return tuple(names)
        raise InputError(f"{origin} is {value!r}; it must be a string or a list of strings")
    wanted = "a whole number" if kind is int else "a number"
    # JSON's true is Python's 1; a float would be cut off silently; a number in quotes in a file is a slip.
    if isinstance(value, bool) or (kind is int and isinstance(value, float) and not value.is_integer()):
        raise InputError(f"{origin} is {value!r}; it must be {wanted}")
    try:
        converted = kind(value)
    except (ValueError, TypeError, OverflowError):
        raise InputError(f"{origin} is {value!r}; it must be {wanted}") from None
    if isinstance(converted, float) and not math.isfinite(converted):
        raise InputError(f"{origin} is {value}; it must be a finite number")
    return converted
