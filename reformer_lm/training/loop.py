"""The training loop: steps, validations, samples and checkpoints, exactly repeatable after a resume."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from reformer_lm.corpus import EvaluationWindows
from reformer_lm.errors import InputError
from reformer_lm.heads.vocabulary import ReformerLMVocabularyHead
from reformer_lm.text import mask_token_of
from reformer_lm.training.averaging import WeightAverage
from reformer_lm.training.batches import BatchMaker, StepWindows, TrainingPlan, Windows
from reformer_lm.training.checkpoints import CheckpointStore, save_state
from reformer_lm.training.evaluation import validate, write_sample
from reformer_lm.training.interruption import StopRequest
from reformer_lm.training.masking import Masking
from reformer_lm.training.models import save_model
from reformer_lm.training.optimization import LearningRateSchedule
from reformer_lm.training.pairs import PairBatches, Pairs, validate_pairs
from reformer_lm.training.parallel import Processes, shard_optimizer_state
from reformer_lm.training.reporting import Reporter, StepReport, Stopwatch
from reformer_lm.training.state import (
    STATE_VERSION,
    DataIdentity,
    Progress,
    capture_random_state,
    restore_random_state,
)
from reformer_lm.training.step import StepRunner

MAX_SKIPPED_IN_A_ROW = 10


@dataclass(frozen=True)
class LoopSettings:
    """How often the loop does what.

    Attributes:
        batch_size: Windows of a validation batch.
        max_grad_norm: Gradients are clipped to this norm.
        eval_every: Steps between validations; 0 for the first and last only.
        save_every: Steps between checkpoints; 0 for the last only.
        sample_every: Steps between samples; 0 for none.
        seed: Of the samples and the noise.
        separate_articles: Whether articles in one window do not see each other.
        pad_articles: Whether windows are articles, padded at their end.
        noise: Probability that a training input's token is replaced by a random one.
        ema: Decay of the weights' moving average, which is then what is validated, sampled and saved; 0 for none.
        early_stopping: Stop after so many validations without a new lowest loss; 0 for never.
        mlm_probability: Share of the tokens that a masked language model is to fill in; 0 for one that predicts the
            next token. The former writes no samples.
    """

    batch_size: int
    max_grad_norm: float = 1.0
    eval_every: int = 0
    save_every: int = 0
    sample_every: int = 0
    seed: int = 0
    separate_articles: bool = False
    pad_articles: bool = False
    noise: float = 0.0
    ema: float = 0.0
    early_stopping: int = 0
    mlm_probability: float = 0.0


class TrainingLoop:
    """Trains a model from one position of a plan to its end.

    Args:
        accelerator: Of this process.
        model: On its device; sharded, if it is to be.
        optimizer: Of that model's parameters.
        tokenizer: Saved with the model, and used for samples.
        windows: Of the training stream; `Pairs` for an encoder-decoder.
        validation: Windows of the validation stream or pairs, None for no validation.
        plan: Which windows each step takes.
        schedule: Learning rate of each step.
        store: Where checkpoints go.
        settings: How often what happens.
        identity: Of the data; saved, so that a run is not resumed on other data.
        reporter: Told of everything.
        stop: Asked after each step.
        options: The run's options as plain values; saved for the record.
    """

    def __init__(
        self,
        *,
        accelerator: Accelerator,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        tokenizer: PreTrainedTokenizerFast,
        windows: Windows,
        validation: EvaluationWindows | Pairs | None,
        plan: TrainingPlan,
        schedule: LearningRateSchedule,
        store: CheckpointStore,
        settings: LoopSettings,
        identity: DataIdentity,
        reporter: Reporter,
        stop: StopRequest,
        options: dict[str, Any],
    ) -> None:
        self.accelerator = accelerator
        self.processes = Processes(accelerator)
        self.bare_model = model
        self.model: torch.nn.Module
        self.optimizer: AcceleratedOptimizer
        self.is_sharded = isinstance(model, FSDPModule)
        if self.is_sharded:
            self.model, self.optimizer = model, accelerator.prepare(optimizer)
        else:
            self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.tokenizer = tokenizer
        self.windows = windows
        self.validation = validation
        self.plan = plan
        self.schedule = schedule
        self.store = store
        self.settings = settings
        self.identity = identity
        self.reporter = reporter
        self.stop = stop
        self.options = options
        # Articles are told apart by the token they begin with. One that was read alone in training is to be judged so.
        separate = settings.separate_articles or (settings.pad_articles and isinstance(model, ReformerLMVocabularyHead))
        self.begin_token: int | None = tokenizer.bos_token_id if separate else None
        self.average = WeightAverage(model, settings.ema) if settings.ema else None
        special_tokens = tuple(tokenizer.all_special_ids)
        self.masking: Masking | None = None
        if settings.mlm_probability:
            mask_token = mask_token_of(tokenizer)
            self.masking = Masking(settings.mlm_probability, mask_token, special_tokens, len(tokenizer))
        self.runner = StepRunner(
            processes=self.processes,
            model=self.model,
            bare_model=model,
            optimizer=self.optimizer,
            batches=PairBatches(windows)
            if isinstance(windows, Pairs)
            else BatchMaker(
                windows=windows,
                begin_token=tokenizer.bos_token_id if settings.separate_articles else None,
                pad_token=tokenizer.pad_token_id if settings.pad_articles else None,
                noise=settings.noise,
                seed=settings.seed,
                special_tokens=special_tokens,
                vocab_size=len(tokenizer),
                masking=self.masking,
            ),
            max_grad_norm=settings.max_grad_norm,
            average=self.average,
        )
        self.progress = Progress()
        # Step at which a resumed run goes on.
        self.resumed_at: int | None = None
        self._saved_step: int | None = None
        self._told_to_stop = False
        self._skipped_in_a_row = 0

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where a saved state left off; the model's weights must be those saved with it.

        Raises:
            InputError: If the state is of another version, other data or another model.
        """
        if state.get("version") != STATE_VERSION:
            raise InputError("--resume: the checkpoint is of another version of this program; use --init_from")
        self.identity.require_same(state["data"])
        decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(shard_optimizer_state(state["optimizer"], self.optimizer))
            # Saved with the rest, but the user may have changed it.
            for group, decay in zip(self.optimizer.param_groups, decays, strict=True):
                group["weight_decay"] = decay
        except (ValueError, KeyError):
            raise InputError(
                "--resume: the checkpoint's optimizer is another one, or of another model; "
                "start anew from its weights with --init_from"
            ) from None
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self._restore_average(state["weights"])
        self.progress = Progress(**state["progress"])
        self._saved_step = self.resumed_at = self.progress.step
        random = state["random"]
        # With more processes than before, those that are new go on with the numbers of their own seed.
        if self.processes.rank < len(random):
            restore_random_state(random[self.processes.rank])

    def _restore_average(self, weights: dict[str, Any] | None) -> None:
        if (self.average is None) != (weights is None):
            said = "with" if weights is not None else "without"
            raise InputError(f"--resume: the run was {said} --ema; give the same, or start anew with --init_from")
        if self.average is not None and weights is not None:
            self.average.restore(weights)

    def run(self) -> Progress:
        """Train to the end of the plan, or until a stop is requested; what was reached is saved.

        Raises:
            InputError: If training diverges or the last checkpoint cannot be saved.
        """
        self.model.train()
        progress = self.progress
        if progress.step == 0:
            self._validate()
        elif progress.validation_is_due and self._validate():
            self._save(may_fail=True)
        stopwatch = Stopwatch()
        for step_windows in self.plan.steps(progress.epoch, progress.windows_done):
            if self._stopping or progress.step >= self.schedule.total_steps or self.stopped_early:
                break
            stopwatch.lap()
            report = self._train_step(step_windows)
            if report is None:
                self.reporter.skipped_step()
            else:
                self.reporter.step(dataclasses.replace(report, seconds=stopwatch.lap()))
            self._after_step()
        # A run that was stopped before its first step has nothing to save, and must not replace an earlier
        # model.
        if progress.step and self._saved_step != progress.step:
            self._save()
        return progress

    @property
    def _stopping(self) -> bool:
        """Whether all processes are to stop. One alone must not leave the others: they hear of its signal in a step."""
        return self._told_to_stop or (self.processes.count == 1 and self.stop.is_requested)

    @property
    def stopped_early(self) -> bool:
        """Whether validation has not become better for so long that the run ends."""
        patience = self.settings.early_stopping
        return 0 < patience <= self.progress.validations_since_best

    def _after_step(self) -> None:
        """Validation, sample and checkpoint, where they are due."""
        step, settings = self.progress.step, self.settings
        last = step == self.schedule.total_steps
        is_best = (last or _is_due(step, settings.eval_every)) and self._validate()
        writes = self.masking is None and not isinstance(self.windows, Pairs)
        if writes and _is_due(step, settings.sample_every) and not self._stopping:
            with self._averaged(), self.accelerator.autocast():
                text = write_sample(self.bare_model, self.tokenizer, settings.seed + step)
            self.reporter.sample(step, text)
        # After the validation, whose result belongs to the saved state.
        if is_best or _is_due(step, settings.save_every):
            self._save(may_fail=not last)

    def _train_step(self, step_windows: StepWindows) -> StepReport | None:
        """One optimizer step over all batches of a group, None if it was skipped."""
        progress = self.progress
        rate = self.schedule.rate(progress.step)
        outcome = self.runner.take(
            step_windows.of_process(self.processes.rank, self.processes.count),
            step_windows.epoch,
            progress.step,
            rate,
            self.stop.is_requested,
        )
        self._told_to_stop = outcome.stop_requested
        progress.step += 1
        progress.epoch, progress.windows_done = step_windows.epoch, step_windows.windows_done
        progress.tokens_seen += outcome.tokens
        if not outcome.is_finite:
            self._note_skipped(rate)
            return None
        self._skipped_in_a_row = 0
        return StepReport(progress.step, outcome.loss, outcome.gradient_norm, rate, outcome.tokens, seconds=0.0)

    def _note_skipped(self, rate: float) -> None:
        self.progress.skipped_steps += 1
        self._skipped_in_a_row += 1
        self.reporter.warn(
            f"step {self.progress.step} left out: loss or gradient is not finite "
            f"({self.progress.skipped_steps} left out so far)"
        )
        if self._skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            newest = self.store.newest() if self._saved_step is not None else None
            remedy = "give a lower --lr or --max_grad_norm"
            raise InputError(
                f"stopped at step {self.progress.step}: loss or gradient was not finite "
                f"{MAX_SKIPPED_IN_A_ROW} times in a row (learning rate {rate:.2e}); {remedy}"
                + (f" and continue from {newest} with --resume" if newest else "")
            )

    def _validate(self) -> bool:
        """Score the validation stream; whether no validation before was better."""
        if self.validation is None:
            return False
        with self._averaged(), self.accelerator.autocast():
            # Not through DistributedDataParallel, which is for gradients.
            model, size, device = self.bare_model, self.settings.batch_size, self.accelerator.device
            if isinstance(self.validation, Pairs):
                result = validate_pairs(model, self.validation, size, device, self._should_stop, self.processes)
            else:
                result = validate(
                    model,
                    self.validation,
                    size,
                    device,
                    should_stop=self._should_stop,
                    begin_token=self.begin_token,
                    processes=self.processes,
                    masking=self.masking,
                )
        self.progress.validation_is_due = result is None
        if result is None:
            self._told_to_stop = True
            return False
        is_best = self.progress.record_validation(result.loss)
        self.reporter.validation(self.progress.step, result)
        # Before the first step there is nothing to keep.
        return is_best and self.progress.step > 0

    def _should_stop(self) -> bool:
        return self._stopping or self.stop.is_requested

    def _averaged(self) -> AbstractContextManager[None]:
        """The model as it is to be judged and saved."""
        return contextlib.nullcontext() if self.average is None else self.average.applied()

    def _save(self, *, may_fail: bool = False) -> None:
        """Write a checkpoint.

        Args:
            may_fail: Whether training goes on without it if it cannot be written; the next one may succeed.

        Raises:
            InputError: If it cannot be written.
        """
        write = self._prepare_checkpoint()
        folder: Path | None = None
        failure: str | None = None
        if self.processes.is_main:
            try:
                folder = self.store.save(self.progress.step, write, self.progress.best_step)
            except InputError as error:
                failure = str(error)
        # All processes go on, or none.
        failure = self.processes.collect(failure)[0]
        if failure is None:
            self._saved_step = self.progress.step
            self.reporter.line(f"step {self.progress.step}  saved {folder}")
        elif may_fail:
            self.reporter.warn(f"{failure}; training goes on")
        else:
            raise InputError(failure)

    def _prepare_checkpoint(self) -> Callable[[Path], None]:
        """Gather what belongs to a checkpoint from all processes; the result writes it into a folder."""
        scaler = self.accelerator.scaler
        state = {
            "version": STATE_VERSION,
            "progress": dataclasses.asdict(self.progress),
            "data": dataclasses.asdict(self.identity),
            "schedule": dataclasses.asdict(self.schedule),
            "optimizer": self.processes.whole(self.optimizer.state_dict()),
            "scaler": None if scaler is None else scaler.state_dict(),
            "random": self.processes.collect(capture_random_state()),
            # The model's file holds the averages, if there are any.
            "weights": None if self.average is None else self.processes.whole(self.average.weights()),
            "options": self.options,
        }
        weights: dict[str, torch.Tensor] | None = None
        if self.is_sharded:
            with self._averaged():
                weights = self.processes.whole(self.bare_model.state_dict())

        def write(folder: Path) -> None:
            with self._averaged() if weights is None else contextlib.nullcontext():
                save_model(folder, self.bare_model, self.tokenizer, weights)
            save_state(folder, state)

        return write


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
