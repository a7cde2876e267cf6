"""The training loop: steps, validations, samples and checkpoints, exactly repeatable after a resume."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from reformer_lm.corpus import ArticleWindows, EvaluationWindows, TokenWindows
from reformer_lm.errors import InputError
from reformer_lm.model import ReformerLMForCausalLM
from reformer_lm.training.batches import StepWindows, TrainingPlan, article_numbers
from reformer_lm.training.checkpoints import CheckpointStore, save_state
from reformer_lm.training.evaluation import validate, write_sample
from reformer_lm.training.interruption import StopRequest
from reformer_lm.training.models import save_model
from reformer_lm.training.optimization import LearningRateSchedule, set_learning_rate
from reformer_lm.training.reporting import Reporter, StepReport, Stopwatch
from reformer_lm.training.state import (
    STATE_VERSION,
    DataIdentity,
    Progress,
    capture_random_state,
    restore_random_state,
)

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
        seed: Of the samples.
        separate_articles: Whether articles in one window do not see each other.
    """

    batch_size: int
    max_grad_norm: float = 1.0
    eval_every: int = 0
    save_every: int = 0
    sample_every: int = 0
    seed: int = 0
    separate_articles: bool = False


class TrainingLoop:
    """Trains a model from one position of a plan to its end.

    Args:
        accelerator: One process on one device.
        model: On any device; accelerate moves it.
        optimizer: Of that model's parameters.
        tokenizer: Saved with the model, and used for samples.
        windows: Of the training stream.
        validation: Windows of the validation stream, None for no validation.
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
        model: ReformerLMForCausalLM,
        optimizer: torch.optim.Optimizer,
        tokenizer: PreTrainedTokenizerFast,
        windows: TokenWindows | ArticleWindows,
        validation: EvaluationWindows | None,
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
        self.bare_model = model
        self.model: torch.nn.Module
        self.optimizer: AcceleratedOptimizer
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
        # Articles are told apart by the token they begin with.
        self.begin_token: int | None = tokenizer.bos_token_id if settings.separate_articles else None
        self.progress = Progress()
        # Step at which a resumed run goes on.
        self.resumed_at: int | None = None
        self._saved_step: int | None = None
        self._skipped_in_a_row = 0

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where a saved state left off; the model's weights must be those saved with it.

        Raises:
            InputError: If the state is of another version, other data or another model.
        """
        if state.get("version") != STATE_VERSION:
            raise InputError("--resume: the checkpoint is of another version of this program; use --pretrained_model")
        self.identity.require_same(state["data"])
        decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            # Saved with the rest, but the user may have changed it.
            for group, decay in zip(self.optimizer.param_groups, decays, strict=True):
                group["weight_decay"] = decay
        except ValueError:
            raise InputError(
                "--resume: the checkpoint's optimizer is of another model; start anew with --pretrained_model"
            ) from None
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        self._saved_step = self.resumed_at = self.progress.step
        restore_random_state(state["random"])

    def run(self) -> Progress:
        """Train to the end of the plan, or until a stop is requested; what was reached is saved.

        Raises:
            InputError: If training diverges or a checkpoint cannot be saved.
        """
        self.model.train()
        progress = self.progress
        if progress.step == 0:
            self._validate()
        stopwatch = Stopwatch()
        for step_windows in self.plan.steps(progress.epoch, progress.windows_done):
            if self.stop.is_requested or progress.step >= self.schedule.total_steps:
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

    def _after_step(self) -> None:
        """Validation, sample and checkpoint, where they are due."""
        step, settings = self.progress.step, self.settings
        last = step == self.schedule.total_steps
        if last or _is_due(step, settings.eval_every):
            self._validate()
        if _is_due(step, settings.sample_every) and not self.stop.is_requested:
            self.reporter.sample(step, write_sample(self.bare_model, self.tokenizer, settings.seed + step))
        # After the validation, whose result belongs to the saved state.
        if _is_due(step, settings.save_every):
            self._save()

    def _train_step(self, step_windows: StepWindows) -> StepReport | None:
        """One optimizer step over all batches of a group, None if it was skipped."""
        batches = [self.windows.batch(indices) for indices in step_windows.batches]
        # Each batch's summed loss is divided by the tokens of all of them: the gradient is then that of one
        # large batch, also where batches have uneven numbers of tokens.
        tokens = sum(count_labels(batch) for batch in batches)
        rate = self.schedule.rate(self.progress.step)
        set_learning_rate(self.optimizer, rate)
        loss = torch.zeros((), device=self.accelerator.device)
        for batch in batches:
            # Rotations that change with the step must be the same in all of its batches.
            self.bare_model.reformer.hash_step = self.progress.step
            batch = batch.to(self.accelerator.device, non_blocking=True)
            articles = {}
            if self.begin_token is not None:
                articles["document_ids"] = article_numbers(batch, self.begin_token)
            output = self.model(input_ids=batch, labels=batch, num_items_in_batch=tokens, **articles)
            self.accelerator.backward(output.loss)
            loss += output.loss.detach()
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm))
        mean_loss = float(loss)
        is_finite = math.isfinite(norm) and math.isfinite(mean_loss)
        # The loss scaler of fp16 skips such a step itself, and needs to be told of it to lower its scale.
        if is_finite or self.accelerator.scaler is not None:
            self.optimizer.step()
        self.optimizer.zero_grad()
        progress = self.progress
        progress.step += 1
        progress.epoch, progress.windows_done = step_windows.epoch, step_windows.windows_done
        progress.tokens_seen += tokens
        if not is_finite:
            self._note_skipped(rate)
            return None
        self._skipped_in_a_row = 0
        return StepReport(progress.step, mean_loss, norm, rate, tokens, seconds=0.0)

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

    def _validate(self) -> None:
        if self.validation is None:
            return
        device = self.accelerator.device
        result = validate(
            self.model,
            self.validation,
            self.settings.batch_size,
            device,
            should_stop=lambda: self.stop.is_requested,
            begin_token=self.begin_token,
        )
        if result is not None:
            self.progress.record_validation(result.loss)
            self.reporter.validation(self.progress.step, result)

    def _save(self) -> None:
        folder = self.store.save(self.progress.step, self._write_checkpoint)
        self._saved_step = self.progress.step
        self.reporter.line(f"step {self.progress.step}  saved {folder}")

    def _write_checkpoint(self, folder: Path) -> None:
        save_model(folder, self.bare_model, self.tokenizer)
        scaler = self.accelerator.scaler
        save_state(
            folder,
            {
                "version": STATE_VERSION,
                "progress": dataclasses.asdict(self.progress),
                "data": dataclasses.asdict(self.identity),
                "schedule": dataclasses.asdict(self.schedule),
                "optimizer": self.optimizer.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "random": capture_random_state(),
                "options": self.options,
            },
        )


def count_labels(batch: Tensor) -> int:
    """Tokens of a batch [B, T] that are predicted: all but the first of each row."""
    return batch.shape[0] * (batch.shape[1] - 1)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
