"""The program train_reformer.py: put a run together, train, save."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from reformer_lm.command_line import EXIT_INTERRUPTED, EXIT_OK, EXIT_SIGNAL, EXIT_WRONG_INPUT, complain
from reformer_lm.config import ReformerLMConfig
from reformer_lm.corpus import ArticleWindows, EvaluationWindows, TokenWindows
from reformer_lm.errors import InputError
from reformer_lm.text import load_tokenizer, tokenizer_fingerprint
from reformer_lm.training.arguments import RunRequest, TrainingArguments, parse_arguments
from reformer_lm.training.batches import TrainingPlan
from reformer_lm.training.checkpoints import CheckpointStore, load_state, require_writable_folder
from reformer_lm.training.corpora import prepare_training_stream, prepare_validation_stream
from reformer_lm.training.devices import choose_device, create_accelerator, describe_device
from reformer_lm.training.evaluation import perplexity
from reformer_lm.training.interruption import StopRequest
from reformer_lm.training.loop import LoopSettings, TrainingLoop
from reformer_lm.training.memory import advice, estimate_memory, explained_out_of_memory, free_memory
from reformer_lm.training.models import ModelSource, choose_model, load_model
from reformer_lm.training.optimization import LearningRateSchedule, build_optimizer, default_warmup
from reformer_lm.training.reporting import Reporter
from reformer_lm.training.state import DataIdentity, Progress, seed_everything


def main(argv: Sequence[str] | None = None) -> int:
    """Run train_reformer.py.

    Args:
        argv: The arguments; None for the program's own.

    Returns:
        The exit status: 0; 2 if the input is wrong (one line on stderr says why); 130 after Ctrl-C,
        143 after SIGTERM.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(parse_arguments(given), given)
    except InputError as error:
        complain(error)
        return EXIT_WRONG_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _run(request: RunRequest, given: Sequence[str]) -> int:
    arguments = request.arguments
    # What costs nothing is checked before anything that costs time.
    accelerator = create_accelerator(choose_device(arguments.device), fp16=arguments.fp16, bf16=arguments.bf16)
    folder, tokenizer = _choose_start(arguments)
    config_is_given = "model_config" in request.given
    source = choose_model(request.config_file, config_is_given, folder, tokenizer)
    length = _window_length(arguments, source)
    mixed = arguments.fp16 or arguments.bf16
    if arguments.estimate:
        _print_estimate(arguments, source.config, length, accelerator.device)
        return EXIT_OK
    for path, flag in ((arguments.output_dir, "--output_dir"), (arguments.writer_dir, "--writer_dir")):
        require_writable_folder(path, flag)

    explained = explained_out_of_memory(source.config, arguments.batch_size, length, mixed)
    with Reporter(arguments.log_step, arguments.quiet) as reporter, explained:
        stream, index = prepare_training_stream(request, tokenizer, reporter)
        held_out = prepare_validation_stream(request, tokenizer, reporter)
        stride = arguments.stride or length
        windows: TokenWindows | ArticleWindows
        if arguments.pad_articles:
            windows = ArticleWindows(stream, length, stride, tokenizer.pad_token_id)
        else:
            windows = TokenWindows(stream, length, stride)
        corpus = index.identity + (", windows of articles" if arguments.pad_articles else "")
        identity = DataIdentity(len(stream), corpus, windows.length, windows.stride, arguments.seed)
        state = load_state(folder) if arguments.resume and folder else None
        # From here on Ctrl-C means: finish the step, save, then stop.
        with StopRequest() as stop:
            plan, schedule = _plan(arguments, len(windows), Progress(**state["progress"]) if state else Progress())
            seed_everything(arguments.seed)
            model = load_model(source, tokenizer).to(accelerator.device)
            loop = TrainingLoop(
                accelerator=accelerator,
                model=model,
                optimizer=build_optimizer(model, arguments.lr, arguments.weight_decay),
                tokenizer=tokenizer,
                windows=windows,
                validation=None if held_out is None else EvaluationWindows(held_out, length),
                plan=plan,
                schedule=schedule,
                store=CheckpointStore(arguments.output_dir, replace_earlier_run=not arguments.resume),
                settings=LoopSettings(
                    batch_size=arguments.batch_size,
                    max_grad_norm=arguments.max_grad_norm,
                    eval_every=arguments.eval_every,
                    save_every=arguments.save_every,
                    sample_every=arguments.sample_every,
                    seed=arguments.seed,
                    separate_articles=arguments.separate_articles,
                ),
                identity=identity,
                reporter=reporter,
                stop=stop,
                options=dataclasses.asdict(arguments),
            )
            _describe_run(request, loop, reporter)
            if state is not None:
                loop.restore(state)
                _note_changes(state["options"], arguments, reporter)
                reporter.line(f"resuming from {folder}, step {loop.progress.step}")
            elif loop.store.newest():
                reporter.warn(
                    f"{arguments.output_dir} holds an earlier run, which the first checkpoint of this one "
                    "replaces; --resume would continue it instead"
                )
            reporter.start(loop.progress.step, schedule.total_steps, arguments.writer_dir)
            loop.run()
            return _finish(request, given, loop, reporter, stop)


def _print_estimate(arguments: TrainingArguments, config: ReformerLMConfig, length: int, device: torch.device) -> None:
    precision = torch.float16 if arguments.fp16 else torch.bfloat16 if arguments.bf16 else None
    with explained_out_of_memory(config, arguments.batch_size, length, precision is not None):
        estimate = estimate_memory(config, arguments.batch_size, length, device, precision)
    print(f"a training step with windows of {length:,} tokens, {arguments.batch_size} to a batch, on {device}:")
    print("\n".join(estimate.lines()))
    free = free_memory(device)
    if free is None:
        return
    print(f"{'free':<12} {free / 2**30:8.2f} GiB")
    if estimate.total > free:
        ways = advice(config, arguments.batch_size, length, precision is not None)
        print(f"that is more than is free; what takes less: {ways}")


def _plan(
    arguments: TrainingArguments, num_windows: int, progress: Progress
) -> tuple[TrainingPlan, LearningRateSchedule]:
    plan = TrainingPlan(
        num_windows=num_windows,
        batch_size=arguments.batch_size,
        gradient_accumulation=arguments.gradient_accumulation,
        epochs=arguments.epochs,
        seed=arguments.seed,
        max_steps=arguments.max_steps,
    )
    total_steps = plan.total_steps(progress.step, progress.epoch, progress.windows_done)
    schedule = LearningRateSchedule(
        peak=arguments.lr,
        total_steps=total_steps,
        warmup_steps=default_warmup(total_steps) if arguments.warmup_steps is None else arguments.warmup_steps,
        kind=arguments.lr_schedule,
        floor_ratio=arguments.min_lr_ratio,
    )
    return plan, schedule


def _choose_start(arguments: TrainingArguments) -> tuple[Path | None, PreTrainedTokenizerFast]:
    """Folder of the weights to start from (None for new ones), and the run's tokenizer."""
    folder: Path | None = None
    if arguments.resume:
        if arguments.pretrained_model:
            raise InputError("--resume and --pretrained_model are both given; --resume has its own weights, choose one")
        folder = CheckpointStore(arguments.output_dir).newest()
        if folder is None:
            raise InputError(
                f"--resume: no checkpoint in {arguments.output_dir}; leave --resume out to start, or give --output_dir"
            )
    elif arguments.pretrained_model:
        folder = Path(arguments.pretrained_model)
        if not (folder / "config.json").is_file():
            raise InputError(f"--pretrained_model: no model in {folder}; give a folder that training wrote")
    if arguments.bpe_token and not arguments.tokenizer_path and folder is None:
        raise InputError(
            "--bpe_token needs a vocabulary built that way: python -m reformer_lm.text.vocabulary "
            f"--bpe_token --corpus {' '.join(arguments.raw_data_path)} --output FOLDER, then --tokenizer_path FOLDER"
        )
    path = arguments.tokenizer_path or folder
    tokenizer = load_tokenizer(path, keep_case=arguments.keep_case, segment=arguments.segment)
    if arguments.bpe_token and type(tokenizer.backend_tokenizer.model).__name__ != "BPE":
        raise InputError(f"--bpe_token: {path} is no byte-pair vocabulary; give one that is, or leave the flag out")
    if (
        arguments.resume
        and arguments.tokenizer_path
        and tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(load_tokenizer(folder))
    ):
        raise InputError(
            f"--resume: {arguments.tokenizer_path} is another tokenizer than the checkpoint's; "
            "leave --tokenizer_path out"
        )
    return folder, tokenizer


def _window_length(arguments: TrainingArguments, source: ModelSource) -> int:
    longest = source.config.max_position_embeddings
    if arguments.max_seq_len is None:
        return longest
    if arguments.max_seq_len > longest:
        raise InputError(
            f"--max_seq_len is {arguments.max_seq_len}, but the model's max_position_embeddings is "
            f"{longest}; give less, or a --model_config with more"
        )
    return arguments.max_seq_len


# Options that change what a resumed run computes, though it may have good reasons to.
_WORTH_A_NOTE = (
    "batch_size",
    "gradient_accumulation",
    "separate_articles",
    "lr",
    "lr_schedule",
    "warmup_steps",
    "min_lr_ratio",
    "weight_decay",
    "max_grad_norm",
    "fp16",
    "bf16",
)


def _note_changes(saved: dict[str, Any], arguments: TrainingArguments, reporter: Reporter) -> None:
    for name in _WORTH_A_NOTE:
        if name in saved and saved[name] != getattr(arguments, name):
            reporter.warn(f"--{name} was {saved[name]} before, now {getattr(arguments, name)}")


def _describe_run(request: RunRequest, loop: TrainingLoop, reporter: Reporter) -> None:
    arguments, windows, plan, schedule = request.arguments, loop.windows, loop.plan, loop.schedule
    parameters = sum(parameter.numel() for parameter in loop.bare_model.parameters())
    precision = {"no": "float32", "bf16": "bfloat16 mixed", "fp16": "float16 mixed"}[loop.accelerator.mixed_precision]
    config = loop.bare_model.config
    origin = request.config_file.path if request.config_file else "the built-in configuration"
    reporter.line(f"device: {describe_device(loop.accelerator.device)}, {precision}")
    reporter.line(
        f"model: {parameters:,} parameters, {config.num_hidden_layers} layers, "
        f"hidden size {config.hidden_size}, up to {config.max_position_embeddings:,} tokens, "
        f"{config.vocab_size:,} in the vocabulary; settings from {origin}"
    )
    reporter.line(
        f"windows: {len(windows):,} per epoch, {'at most ' if arguments.pad_articles else ''}{windows.length:,} tokens "
        f"each, one every {windows.stride:,} tokens"
    )
    reporter.line(
        f"steps: {schedule.total_steps:,} in all, {plan.steps_per_epoch:,} per epoch, "
        f"{min(plan.windows_per_step, len(windows)) * windows.length:,} tokens per step "
        f"({plan.batch_size} x {plan.gradient_accumulation} windows)"
    )
    if windows.stride > windows.length:
        skipped = windows.stride - windows.length
        reporter.warn(f"--stride {windows.stride} leaves out {skipped} tokens after each window of {windows.length}")
    if schedule.warmup_steps >= schedule.total_steps > 0:
        reporter.warn(
            f"--warmup_steps {schedule.warmup_steps} is no less than the {schedule.total_steps} steps of "
            f"this run; the learning rate will not reach {schedule.peak}"
        )
    if arguments.max_steps is not None and schedule.total_steps < arguments.max_steps:
        reporter.warn(f"--epochs {arguments.epochs} ends after {schedule.total_steps} steps, before --max_steps")


def _finish(
    request: RunRequest,
    given: Sequence[str],
    loop: TrainingLoop,
    reporter: Reporter,
    stop: StopRequest,
) -> int:
    progress, output_dir = loop.progress, request.arguments.output_dir
    if progress.skipped_steps:
        reporter.warn(f"{progress.skipped_steps} steps were left out because loss or gradient was not finite")
    if stop.signal_number is not None and progress.step < loop.schedule.total_steps:
        if progress.step == 0:
            reporter.result("stopped before the first step; nothing was saved")
        else:
            reporter.result(f"stopped and saved at step {progress.step}; continue with: {_resume_command(given)}")
        return EXIT_SIGNAL + stop.signal_number
    if loop.resumed_at is not None and loop.resumed_at >= loop.schedule.total_steps:
        reporter.warn(f"{output_dir} had all its steps already; more --epochs or --max_steps would continue it")
    if progress.first_loss is not None and progress.last_loss is not None:
        reporter.result(
            f"validation PPL {perplexity(progress.first_loss):,.1f} at first, {perplexity(progress.last_loss):,.1f} now"
        )
    reporter.result(
        f"model saved in {output_dir}; try: python predict.py --model_dir {shlex.quote(output_dir)} --text 春天"
    )
    return EXIT_OK


def _resume_command(given: Sequence[str]) -> str:
    program = "python train_reformer.py" if sys.argv[0].endswith(".py") else "reformer-train"
    kept = [argument for argument in given if argument not in ("--raw", "--resume")]
    return " ".join([program, shlex.join([*kept, "--resume"])])
