"""The program train_reformer.py: put a run together, train, save."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PretrainedConfig

from reformer_lm.command_line import EXIT_INTERRUPTED, EXIT_OK, EXIT_WRONG_INPUT, complain
from reformer_lm.config import ReformerLMConfig
from reformer_lm.errors import InputError
from reformer_lm.training.arguments import RunRequest, TrainingArguments, parse_arguments
from reformer_lm.training.batches import TrainingPlan
from reformer_lm.training.checkpoints import BEST_NAME, CheckpointStore, require_writable_folder
from reformer_lm.training.devices import choose_device, create_accelerator, describe_device, num_processes
from reformer_lm.training.evaluation import perplexity
from reformer_lm.training.interruption import StopRequest
from reformer_lm.training.loop import LoopSettings, TrainingLoop
from reformer_lm.training.memory import advice, estimate_memory, explained_out_of_memory, free_memory
from reformer_lm.training.models import ModelSource, choose_model, compile_layers, load_model, train_only
from reformer_lm.training.optimization import LearningRateSchedule, build_optimizer, default_warmup
from reformer_lm.training.parallel import shard
from reformer_lm.training.reporting import Reporter
from reformer_lm.training.run_data import RunData, prepare_data, require_options_of_pairs
from reformer_lm.training.run_folder import RunFolder, describe_start, resolved_settings, settings_text
from reformer_lm.training.starts import Start, choose_start, note_changes
from reformer_lm.training.state import Progress, seed_everything
from reformer_lm.training.tasks import TASKS

# What accelerate's names for it mean.
PRECISIONS = {"no": "float32", "bf16": "bfloat16 mixed", "fp16": "float16 mixed"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run train_reformer.py.

    Args:
        argv: The arguments; None for the program's own.

    Returns:
        The exit status: 0, also after Ctrl-C or SIGTERM, which end the step, save and say how to go on; 2 if the input
        is wrong (one line on stderr says why); 130 if Ctrl-C came twice, or before training began.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(parse_arguments(given), given)
    except InputError as error:
        # Of several processes each may have its own complaint.
        complain(error if num_processes() == 1 else f"process {os.environ.get('RANK')}: {error}")
        return EXIT_WRONG_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _run(request: RunRequest, given: Sequence[str]) -> int:
    arguments = request.arguments
    # What costs nothing is checked before anything that costs time.
    if arguments.task == "seq2seq":
        require_options_of_pairs(request)
    device = choose_device(arguments.device)
    start = choose_start(arguments)
    tokenizer = start.tokenizer
    task = TASKS[arguments.task]
    source = choose_model(request.config_file, "model_config" in request.given, start.folder, tokenizer, task)
    length = _window_length(arguments, source)
    if arguments.separate_articles and not isinstance(source.config, ReformerLMConfig):
        raise InputError(
            f"--separate_articles: a {source.config.model_type} cannot keep articles in one window apart; "
            "give --pad_articles"
        )
    accelerator = create_accelerator(
        device,
        fp16=arguments.fp16,
        bf16=arguments.bf16,
        fsdp=arguments.fsdp,
        layer_dropout=getattr(source.config, "layer_dropout", 0.0),
    )
    mixed = arguments.fp16 or arguments.bf16
    if arguments.print_config:
        if accelerator.is_main_process:
            print(settings_text(resolved_settings(request, source.config)), end="")
        return EXIT_OK
    if arguments.estimate:
        _print_estimate(arguments, source, length, accelerator.device)
        return EXIT_OK
    for path, flag in ((arguments.output_dir, "--output_dir"), (arguments.writer_dir, "--writer_dir")):
        require_writable_folder(path, flag)

    is_main = accelerator.is_main_process
    explained = explained_out_of_memory(source.config, arguments.batch_size, length, mixed)
    with Reporter(arguments.log_step, arguments.quiet, is_main, arguments.report_to) as reporter, explained:
        # The main process tokenises, and the others find it done.
        with accelerator.main_process_first():
            data = prepare_data(request, tokenizer, reporter, length)
        windows = data.windows
        state = start.state()
        # From here on Ctrl-C means: finish the step, save, then stop.
        with StopRequest() as stop:
            progress = Progress(**state["progress"]) if state else Progress()
            plan, schedule = _plan(arguments, len(windows), progress, accelerator.num_processes)
            seed_everything(arguments.seed)
            model = load_model(source, tokenizer).to(accelerator.device)
            train_only(model, arguments.train_only)
            if arguments.fsdp:
                shard(model)
            if arguments.compile:
                compile_layers(model)
            # The same weights in all processes, and dropout of its own in each.
            seed_everything(arguments.seed + accelerator.process_index)
            store = CheckpointStore(
                arguments.output_dir, arguments.save_total_limit, replace_beyond=start.replace_beyond
            )
            loop = TrainingLoop(
                accelerator=accelerator,
                model=model,
                optimizer=build_optimizer(model, arguments.lr, arguments.weight_decay, arguments.optimizer),
                tokenizer=tokenizer,
                windows=windows,
                validation=data.validation,
                plan=plan,
                schedule=schedule,
                store=store,
                settings=LoopSettings(
                    batch_size=arguments.batch_size,
                    max_grad_norm=arguments.max_grad_norm,
                    eval_every=arguments.eval_every,
                    save_every=arguments.save_every,
                    sample_every=arguments.sample_every,
                    seed=arguments.seed,
                    separate_articles=arguments.separate_articles,
                    pad_articles=arguments.pad_articles,
                    noise=arguments.noise,
                    ema=arguments.ema,
                    early_stopping=arguments.early_stopping,
                    mlm_probability=arguments.mlm_probability if arguments.task == "mlm" else 0.0,
                ),
                identity=data.identity,
                reporter=reporter,
                stop=stop,
                options=dataclasses.asdict(arguments),
            )
            _describe_run(request, loop, data, reporter)
            if state is not None:
                loop.restore(state)
                if is_main and start.folder is not None:
                    store.settle(start.folder, loop.progress.best_step)
                note_changes(state["options"], arguments, reporter)
                reporter.line(f"resuming from {start.folder}, step {loop.progress.step}")
            elif is_main and store.newest():
                reporter.warn(
                    f"{arguments.output_dir} holds an earlier run, which the first checkpoint of this one "
                    "replaces; --resume would continue it instead"
                )
            reporter.start(
                loop.progress.step,
                schedule.total_steps,
                arguments.writer_dir,
                folder=_run_folder(request, given, start, source.config, loop, data),
                progress=loop.progress,
            )
            loop.run()
            return _finish(request, given, loop, reporter, stop)


def _print_estimate(arguments: TrainingArguments, source: ModelSource, length: int, device: torch.device) -> None:
    config = source.config
    precision = torch.float16 if arguments.fp16 else torch.bfloat16 if arguments.bf16 else None
    with explained_out_of_memory(config, arguments.batch_size, length, precision is not None):
        estimate = estimate_memory(
            config, arguments.batch_size, length, device, precision, arguments.optimizer, arguments.ema > 0, source.task
        )
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
    arguments: TrainingArguments, num_windows: int, progress: Progress, num_processes: int
) -> tuple[TrainingPlan, LearningRateSchedule]:
    plan = TrainingPlan(
        num_windows=num_windows,
        batch_size=arguments.batch_size,
        gradient_accumulation=arguments.gradient_accumulation,
        epochs=arguments.epochs,
        seed=arguments.seed,
        max_steps=arguments.max_steps,
        num_processes=num_processes,
    )
    total_steps = plan.total_steps(progress.step, progress.epoch, progress.windows_done)
    schedule = LearningRateSchedule(
        peak=arguments.lr,
        total_steps=total_steps,
        warmup_steps=default_warmup(total_steps) if arguments.warmup_steps is None else arguments.warmup_steps,
        kind=arguments.lr_schedule,
        floor_ratio=arguments.min_lr_ratio,
        decay_share=arguments.lr_decay_share,
    )
    return plan, schedule


def _window_length(arguments: TrainingArguments, source: ModelSource) -> int:
    longest = int(source.config.max_position_embeddings)
    if arguments.max_seq_len is None:
        return longest
    if arguments.max_seq_len > longest:
        raise InputError(
            f"--max_seq_len is {arguments.max_seq_len}, but the model's max_position_embeddings is "
            f"{longest}; give less, or a --model_config with more"
        )
    return arguments.max_seq_len


def _run_folder(
    request: RunRequest,
    given: Sequence[str],
    start: Start,
    config: PretrainedConfig,
    loop: TrainingLoop,
    data: RunData,
) -> RunFolder:
    description = describe_start(
        given,
        loop.accelerator.device,
        loop.progress.step,
        {
            "parameters": sum(parameter.numel() for parameter in loop.bare_model.parameters()),
            "precision": PRECISIONS[loop.accelerator.mixed_precision],
            "processes": loop.accelerator.num_processes,
            "data": dict(data.facts),
        },
    )
    # A run restored from another folder has nothing behind it in this one.
    is_resumed = start.continues and start.replace_beyond != 0
    settings = resolved_settings(request, config)
    return RunFolder(Path(request.arguments.output_dir), settings, description, is_resumed=is_resumed)


def _describe_run(request: RunRequest, loop: TrainingLoop, data: RunData, reporter: Reporter) -> None:
    arguments, windows, plan, schedule = request.arguments, loop.windows, loop.plan, loop.schedule
    parameters = sum(parameter.numel() for parameter in loop.bare_model.parameters())
    precision = PRECISIONS[loop.accelerator.mixed_precision]
    config = loop.bare_model.config
    origin = request.config_file.path if request.config_file else "the built-in configuration"
    reporter.line(f"device: {describe_device(loop.accelerator.device)}, {precision}")
    reporter.line(
        f"model: {parameters:,} parameters, {config.num_hidden_layers} layers, "
        f"hidden size {config.hidden_size}, up to {config.max_position_embeddings:,} tokens, "
        f"{config.vocab_size:,} in the vocabulary; settings from {origin}"
    )
    reporter.line(data.description)
    shared = f" in each of {plan.num_processes} processes" if plan.num_processes > 1 else ""
    reporter.line(
        f"steps: {schedule.total_steps:,} in all, {plan.steps_per_epoch:,} per epoch, "
        f"{min(plan.windows_per_step, len(windows)) * windows.length:,} tokens per step "
        f"({plan.batch_size} x {plan.gradient_accumulation} windows{shared})"
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
    best = f"; the best was step {progress.best_step}: {output_dir.rstrip('/')}/{BEST_NAME}"
    best = best if loop.store.of_step(progress.best_step or 0).is_dir() and progress.best_step != progress.step else ""
    if stop.signal_number is not None and progress.step < loop.schedule.total_steps and not loop.stopped_early:
        if progress.step == 0:
            reporter.result("stopped before the first step; nothing was saved")
        else:
            reporter.result(f"stopped and saved at step {progress.step}; continue with: {_resume_command(given)}")
        return EXIT_OK
    if loop.stopped_early:
        reporter.result(
            f"stopped at step {progress.step}: {progress.validations_since_best} validations without a lower loss than "
            f"at step {progress.best_step}"
        )
    if loop.resumed_at is not None and loop.resumed_at >= loop.schedule.total_steps:
        reporter.warn(f"{output_dir} had all its steps already; more --epochs or --max_steps would continue it")
    if progress.first_loss is not None and progress.last_loss is not None:
        reporter.result(
            f"validation PPL {perplexity(progress.first_loss):,.1f} at first, {perplexity(progress.last_loss):,.1f} now"
        )
    text = "春[MASK]" if request.arguments.task == "mlm" else "春天"
    reporter.result(
        f"model saved in {output_dir}{best}; try: python predict.py --model_dir {shlex.quote(output_dir)} --text {text}"
    )
    return EXIT_OK


def _resume_command(given: Sequence[str]) -> str:
    program = "python train_reformer.py" if sys.argv[0].endswith(".py") else "reformer-train"
    kept = list(given)
    if "--restore" in kept:
        del kept[kept.index("--restore") : kept.index("--restore") + 2]
    kept = [word for word in kept if word not in ("--raw", "--resume") and not word.startswith("--restore=")]
    return " ".join([program, shlex.join([*kept, "--resume"])])
