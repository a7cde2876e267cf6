"""predict.py: parse the command line, load the model, generate or score, print."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from reformer_lm.command_line import EXIT_INTERRUPTED, EXIT_OK, EXIT_SIGNAL, EXIT_WRONG_INPUT, complain
from reformer_lm.encoder_decoder import ReformerLMForConditionalGeneration
from reformer_lm.errors import InputError
from reformer_lm.generation import Conversation, GenerationSettings, TextGenerator
from reformer_lm.heads.masked_lm import ReformerLMForMaskedLM
from reformer_lm.prediction import reports
from reformer_lm.prediction.arguments import parse_arguments
from reformer_lm.prediction.filling import FillingJob, require_filling
from reformer_lm.prediction.inputs import FileOptions, decode_line, given_texts, require_unicode
from reformer_lm.prediction.saved_model import choose_device, choose_dtype, load_model
from reformer_lm.prediction.scoring_job import ScoringJob, join_processes
from reformer_lm.prediction.target_job import TargetJob, require_sources

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast, TextStreamer

# In place of a line of text with --interactive.
NEW_TEXT = "/new"
GENERATION_BATCH_SIZE = 8
# What a shell reports for a program whose reader went away (SIGPIPE).
EXIT_BROKEN_PIPE = EXIT_SIGNAL + 13


def main(argv: Sequence[str] | None = None) -> int:
    """Run predict.py.

    Args:
        argv: The arguments; None for the program's own.

    Returns:
        The exit status: 0, 2 if the input is wrong (one line on stderr says why), 130 if interrupted.
    """
    try:
        arguments = parse_arguments(argv)
        _run(arguments)
        sys.stdout.flush()
    except InputError as error:
        complain(error)
        return EXIT_WRONG_INPUT
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # `predict.py ... | head`: stdout is replaced, or flushing it at exit would fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    return EXIT_OK


def _run(arguments: argparse.Namespace) -> None:
    """Do what was asked for."""
    # What costs nothing is checked before the model is loaded.
    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype, device)
    require_unicode(arguments.text, "--text")
    require_unicode(arguments.compare, "--compare")
    if arguments.ppl:
        leave = join_processes(arguments.file)
        try:
            model, tokenizer = load_model(arguments.model_dir, device, dtype)
            if isinstance(model, ReformerLMForMaskedLM):
                require_filling(arguments)
            if isinstance(model, ReformerLMForConditionalGeneration):
                require_sources(arguments)
            _score(arguments, ScoringJob(arguments, model, tokenizer))
        finally:
            leave()
        return
    model, tokenizer = load_model(arguments.model_dir, device, dtype)
    job: FillingJob | TargetJob | _Generation
    if isinstance(model, ReformerLMForMaskedLM):
        job = FillingJob(arguments, model, tokenizer)
    elif isinstance(model, ReformerLMForConditionalGeneration):
        job = TargetJob(arguments, _settings_of(arguments), _seed_of(arguments), model, tokenizer)
    else:
        job = _Generation(arguments, model, tokenizer)
    if arguments.interactive:
        _converse(job.turn, quiet=arguments.quiet)
    else:
        options = FileOptions(arguments.field, arguments.column, arguments.encoding)
        job.run(iter([""]) if arguments.unconditional else given_texts(arguments.text, arguments.file, options))


def _score(arguments: argparse.Namespace, job: ScoringJob) -> None:
    """--ppl."""
    if arguments.interactive:
        _converse(job.turn, quiet=arguments.quiet)
    elif arguments.compare:
        job.compare()
    else:
        job.run()


def _settings_of(arguments: argparse.Namespace) -> GenerationSettings:
    return GenerationSettings(
        length=arguments.length,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        repetition_penalty=arguments.repetition_penalty,
        min_p=arguments.min_p,
        typical_p=arguments.typical_p,
        no_repeat_ngram=arguments.no_repeat_ngram,
        stop=tuple(arguments.stop),
        overflow=arguments.overflow,
    )


def _seed_of(arguments: argparse.Namespace) -> int:
    return secrets.randbelow(2**31) if arguments.seed is None else int(arguments.seed)


class _Generation:
    """Everything else."""

    def __init__(
        self, arguments: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        self._settings = _settings_of(arguments)
        self._seed = _seed_of(arguments)
        self._samples: int = arguments.nsamples
        self._batch_size = arguments.batch_size or GENERATION_BATCH_SIZE
        self._json: bool = arguments.json
        self._quiet: bool = arguments.quiet
        self._keep_empty: bool = arguments.unconditional
        self._generator = TextGenerator(model, tokenizer, seed=self._seed, on_note=_note)
        self._conversation = Conversation(self._generator, self._settings)

    def run(self, texts: Iterator[str]) -> None:
        """Print the samples of each text, and to stderr the seed and the speed."""
        prompts = [text for text in texts if text.strip() or self._keep_empty]
        if not prompts:
            raise InputError("the text is empty; for articles from nothing there is --unconditional")
        started = time.perf_counter()
        tokens = self._stream(prompts) if self._is_streamed(prompts) else self._print(prompts)
        self._note_speed(tokens, time.perf_counter() - started)

    def turn(self, line: str) -> None:
        """Go on with the text of the conversation, or begin another."""
        if line == NEW_TEXT:
            self._conversation.begin_anew()
            return
        started = time.perf_counter()
        if self._json:
            sample = self._conversation.turn(line)
            print(reports.sample_json(sample, self._settings, self._seed), flush=True)
        else:
            print(line, end="", flush=True)
            sample = self._conversation.turn(line, self._streamer())
            print()
        self._note_speed(len(sample.token_ids), time.perf_counter() - started)

    def _note_speed(self, tokens: int, seconds: float) -> None:
        if not self._quiet:
            _note(f"seed {self._seed}; {tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s")

    def _streamer(self) -> TextStreamer:
        return self._generator.streamer(lambda piece: print(piece, end="", flush=True), self._settings.stop)

    def _is_streamed(self, prompts: Sequence[str]) -> bool:
        return len(prompts) == 1 and self._samples == 1 and not self._json

    def _stream(self, prompts: Sequence[str]) -> int:
        """Print a single sample while it is drawn."""
        samples = self._generator.generate(prompts, self._settings, streamer=self._streamer())
        print(prompts[0], end="", flush=True)
        (sample,) = samples
        print()
        return len(sample.token_ids)

    def _print(self, prompts: Sequence[str]) -> int:
        """Print samples as their batches become ready."""
        tokens = 0
        for sample in self._generator.generate(
            prompts, self._settings, samples=self._samples, batch_size=self._batch_size
        ):
            if self._json:
                print(reports.sample_json(sample, self._settings, self._seed), flush=True)
            else:
                if not self._quiet:
                    print(reports.sample_header(sample, len(prompts), self._samples))
                print(sample.prompt + sample.text, flush=True)
            tokens += len(sample.token_ids)
        return tokens


def _converse(turn: Callable[[str], None], *, quiet: bool) -> None:
    """Give a job one line of stdin at a time, until an empty one or the end. A mistake does not end it."""
    while True:
        if not quiet:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline()
        if not line and not quiet:
            print(file=sys.stderr)
        line = line.rstrip(b"\r\n")
        if not line:
            return
        try:
            turn(decode_line(line))
        # RuntimeError: the device's memory may be too small for this text, and large enough for the next.
        except (InputError, RuntimeError) as error:
            complain(error)


def _note(line: str) -> None:
    print(line, file=sys.stderr)
