"""`python -m reformer_lm.convert`: parse the command line, convert, verify, write."""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast, ReformerConfig, ReformerModelWithLMHead

from reformer_lm.command_line import EXIT_INTERRUPTED, EXIT_OK, EXIT_WRONG_INPUT, CommandLineParser, complain
from reformer_lm.convert import folders
from reformer_lm.convert.hf_reformer import from_transformers, read_weights
from reformer_lm.convert.reformer_pytorch import from_reformer_pytorch, to_reformer_pytorch
from reformer_lm.convert.reformer_pytorch_reading import bare_names, with_what_shapes_say
from reformer_lm.convert.safe_loading import read_json
from reformer_lm.convert.verification import (
    TOLERANCE,
    Agreement,
    compare_with_reformer_pytorch,
    compare_with_transformers,
)
from reformer_lm.errors import InputError
from reformer_lm.model import ReformerLMForCausalLM

EXIT_DIFFERENT = 1
_FROM = (folders.REFORMER_PYTORCH, folders.REFORMER_CHINESE, folders.TRANSFORMERS)


def build_parser() -> CommandLineParser:
    """The command line."""
    parser = CommandLineParser(
        prog="python -m reformer_lm.convert",
        bare_argument_hint="there is one SOURCE, everything else belongs to a flag",
        description="Convert the weights of reformer-pytorch, reformer-chinese or transformers' Reformer, or a model "
        "of this package to reformer-pytorch.",
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="file of weights, or folder of a model")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--from", dest="from_format", choices=_FROM, help="what SOURCE is (found out)")
    parser.add_argument(
        "--to", dest="to_format", choices=(folders.REFORMER_PYTORCH,), help="convert a model of this package to that"
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="arguments of ReformerLM as a JSON object, for a state dict"
    )
    parser.add_argument("--vocab", type=Path, metavar="FILE", help="vocab.txt of the model (SOURCE's, if there is one)")
    parser.add_argument("--keep_case", action="store_true", help="the vocabulary has capital letters: keep them apart")
    parser.add_argument(
        "--causal",
        action="store_true",
        help="give the model the exactly causal mask: another function of the same weights, which wants fine-tuning",
    )
    parser.add_argument(
        "--verify", action="store_true", help="run both models on the same tokens; write only if they agree"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        metavar="FLOAT",
        help=f"largest difference of two logits that --verify accepts ({TOLERANCE})",
    )
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> Namespace:
    """Parses the command line.

    Raises:
        InputError: a flag is unknown, or flags do not go together.
    """
    arguments = build_parser().parse_strictly(argv)
    if arguments.to_format and (arguments.from_format or arguments.config or arguments.causal):
        raise InputError("--to converts a model of this package: leave out --from, --config and --causal")
    if arguments.causal and arguments.verify:
        raise InputError(
            "--causal makes another function of the weights, which --verify would find different; give one"
        )
    if not arguments.tolerance >= 0 or math.isinf(arguments.tolerance):
        raise InputError(f"--tolerance is {arguments.tolerance}; give a number of at least 0")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: The arguments; None for the program's own.

    Returns:
        The exit status: 0, 1 if ``--verify`` found a difference, 2 if the input is wrong (one line on stderr says
        why), 130 if interrupted.
    """
    try:
        return _run(parse_arguments(argv))
    except InputError as error:
        complain(error)
        return EXIT_WRONG_INPUT
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _run(arguments: Namespace) -> int:
    source, output = arguments.source, arguments.output
    folders.require_free(output, arguments.overwrite)
    if source.resolve() == output.resolve():
        raise InputError(f"--output {output} is SOURCE itself; give another folder")
    if arguments.to_format:
        return _export(arguments)
    kind = arguments.from_format or folders.detect_format(source)
    if kind == folders.OURS:
        raise InputError(f"{source} is a model of this package already; --to {folders.REFORMER_PYTORCH} converts it")
    tokenizer = folders.find_tokenizer(source, arguments.vocab, arguments.keep_case)
    if kind == folders.TRANSFORMERS:
        model, agreement = _from_transformers(arguments)
    else:
        model, agreement = _from_reformer_pytorch(arguments, kind)
    if agreement is not None and not _agrees(agreement, arguments.tolerance):
        return EXIT_DIFFERENT
    folders.write_model(model, tokenizer, output)
    _tell(model, tokenizer, output)
    return EXIT_OK


def _from_reformer_pytorch(arguments: Namespace, kind: str) -> tuple[ReformerLMForCausalLM, Agreement | None]:
    if kind == folders.REFORMER_CHINESE:
        state, options = folders.read_reformer_chinese(arguments.source, arguments.config, _note)
    else:
        state, options = folders.read_reformer_pytorch(arguments.source, arguments.config)
    model = from_reformer_pytorch(state, options, causal=arguments.causal, on_note=_note)
    if not arguments.verify:
        return model, None
    state, _ = bare_names(state)
    options = with_what_shapes_say(options, state, lambda line: None)
    return model, compare_with_reformer_pytorch(model, state, options)


def _from_transformers(arguments: Namespace) -> tuple[ReformerLMForCausalLM, Agreement | None]:
    if arguments.config is not None:
        raise InputError(
            "--config is for a state dict of reformer-pytorch; a folder of transformers has its config.json"
        )
    model = from_transformers(arguments.source, causal=arguments.causal, on_note=_note)
    if not arguments.verify:
        return model, None
    options = read_json(arguments.source / "config.json")
    options.pop("num_hidden_layers", None)
    peer = ReformerModelWithLMHead(ReformerConfig(**options))
    # Nothing is missing or unknown, as the conversion found; what older versions saved besides is no weight.
    peer.load_state_dict(read_weights(arguments.source), strict=False)
    return model, compare_with_transformers(model, peer)


def _export(arguments: Namespace) -> int:
    """--to reformer-pytorch."""
    model = _load_ours(arguments.source)
    state, options = to_reformer_pytorch(model)
    if arguments.verify and not _agrees(compare_with_reformer_pytorch(model, state, options), arguments.tolerance):
        return EXIT_DIFFERENT
    folders.write_reformer_pytorch(state, options, arguments.output)
    print(f"wrote {arguments.output}: {folders.STATE_FILE} ({len(state):,} tensors) and {folders.OPTIONS_FILE}")
    return EXIT_OK


def _load_ours(folder: Path) -> ReformerLMForCausalLM:
    if not folder.is_dir() or folders.detect_format(folder) != folders.OURS:
        raise InputError(f"{folder} is no folder of a model of this package; --to converts one")
    try:
        model, report = ReformerLMForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder}: the model cannot be loaded ({str(error).splitlines()[0]})") from None
    wrong: list[Any] = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if wrong:
        raise InputError(f"{folder}: {wrong[0]} and {len(wrong) - 1} more are not as config.json says; copy it again")
    return model.eval()


def _agrees(agreement: Agreement, tolerance: float) -> bool:
    """Prints what the comparison found, and says whether that is good enough."""
    found = agreement.largest_difference
    good = found <= tolerance
    lengths = ", ".join(f"{tokens:,}" for tokens in agreement.tokens)
    verdict = "within" if good else "beyond"
    print(
        f"largest difference of two logits: {found:.2e} ({verdict} the tolerance of {tolerance:g}; logits up to "
        f"{agreement.largest_logit:.3g}; {lengths} tokens)"
    )
    if not good:
        complain("the two models differ; nothing was written")
    return good


def _tell(model: ReformerLMForCausalLM, tokenizer: PreTrainedTokenizerFast | None, output: Path) -> None:
    config = model.config
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"wrote {output}: {config.num_hidden_layers} layers, {count:,} parameters, lsh_mask={config.lsh_mask!r}")
    if tokenizer is None:
        _note("no tokenizer was written; predict.py needs one: give the model's vocab.txt with --vocab")
    if config.lsh_mask == "chunked":
        _note("chunked attention is not exactly causal and has no cache; --causal converts to the mask that is and has")
    else:
        _note("with the causal mask these weights compute another function than before; fine-tune them")


def _note(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)
