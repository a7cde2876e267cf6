"""Where a run starts: from new weights, from given ones, or exactly where an earlier run left off."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from reformer_lm.errors import InputError
from reformer_lm.text import load_tokenizer, tokenizer_fingerprint
from reformer_lm.training.arguments import TrainingArguments
from reformer_lm.training.checkpoints import STATE_NAME, CheckpointStore, load_state, step_of
from reformer_lm.training.reporting import Reporter

# Options that change what a resumed run computes, though it may have good reasons to.
_WORTH_A_NOTE = (
    "batch_size",
    "gradient_accumulation",
    "separate_articles",
    "optimizer",
    "train_only",
    "lr",
    "lr_schedule",
    "lr_decay_share",
    "warmup_steps",
    "min_lr_ratio",
    "weight_decay",
    "max_grad_norm",
    "noise",
    "mlm_probability",
    "ema",
    "fp16",
    "bf16",
)


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        folder: Of the weights, None for new ones.
        tokenizer: Of the run.
        continues: Whether the folder is a checkpoint that the run continues exactly.
        replace_beyond: Checkpoints in the output folder of later steps than this are another run's (None: none are).
    """

    folder: Path | None
    tokenizer: PreTrainedTokenizerFast
    continues: bool
    replace_beyond: int | None

    def state(self) -> dict[str, Any] | None:
        """What is to be continued, None for a new run.

        Raises:
            InputError: If it is missing or damaged.
        """
        return load_state(self.folder) if self.continues and self.folder is not None else None


def choose_start(arguments: TrainingArguments) -> Start:
    """Find out where a run starts, and its tokenizer.

    Raises:
        InputError: If there is nothing to start from where the user said, or the tokenizer does not fit.
    """
    checkpoint, replace_beyond = _checkpoint(arguments)
    if checkpoint is not None and arguments.init_from and arguments.restore is None:
        raise InputError("--resume and --init_from are both given; --resume has its own weights, choose one")
    folder = checkpoint
    if checkpoint is None and arguments.init_from:
        folder = Path(arguments.init_from)
        if not (folder / "config.json").is_file():
            raise InputError(f"--init_from: no model in {folder}; give a folder that training wrote")
    tokenizer = _tokenizer(arguments, folder)
    if (
        checkpoint is not None
        and arguments.tokenizer_path
        and tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(load_tokenizer(checkpoint))
    ):
        raise InputError(
            f"--resume: {arguments.tokenizer_path} is another tokenizer than the checkpoint's; "
            "leave --tokenizer_path out"
        )
    return Start(folder, tokenizer, checkpoint is not None, replace_beyond)


def _checkpoint(arguments: TrainingArguments) -> tuple[Path | None, int | None]:
    """The checkpoint to continue, and beyond which step those in the output folder are another run's."""
    newest = CheckpointStore(arguments.output_dir).newest()
    if arguments.resume:
        if newest is None:
            raise InputError(
                f"--resume: no checkpoint in {arguments.output_dir}; leave --resume out to start, or give --output_dir"
            )
        return newest, None
    if arguments.restore in (None, "fresh"):
        return None, 0
    if arguments.restore == "latest":
        # For jobs that are started again and again until they are done.
        return newest, None if newest is not None else 0
    folder = Path(arguments.restore)
    if not (folder / STATE_NAME).is_file():
        raise InputError(
            f"--restore: no checkpoint in {folder} ({STATE_NAME} is missing); give latest, fresh, or a folder such as "
            f"{arguments.output_dir.rstrip('/')}/checkpoints/step-00000500"
        )
    if folder.resolve() == Path(arguments.output_dir).resolve():
        return newest, None
    own = [path.resolve() for path in CheckpointStore(arguments.output_dir).complete()]
    return folder, step_of(folder) if folder.resolve() in own else 0


def _tokenizer(arguments: TrainingArguments, folder: Path | None) -> PreTrainedTokenizerFast:
    if arguments.bpe_token and not arguments.tokenizer_path and folder is None:
        raise InputError(
            "--bpe_token needs a vocabulary built that way: python -m reformer_lm.text.vocabulary "
            f"--bpe_token --corpus {' '.join(arguments.raw_data_path)} --output FOLDER, then --tokenizer_path FOLDER"
        )
    path = arguments.tokenizer_path or folder
    tokenizer = load_tokenizer(path, keep_case=arguments.keep_case, segment=arguments.segment)
    if arguments.bpe_token and type(tokenizer.backend_tokenizer.model).__name__ != "BPE":
        raise InputError(f"--bpe_token: {path} is no byte-pair vocabulary; give one that is, or leave the flag out")
    return tokenizer


def note_changes(saved: dict[str, Any], arguments: TrainingArguments, reporter: Reporter) -> None:
    """Name the options that a continued run changes.

    Args:
        saved: Options of the run so far.
        arguments: Of this one.
        reporter: Gets a line for each.
    """
    for name in _WORTH_A_NOTE:
        if name in saved and saved[name] != getattr(arguments, name):
            reporter.warn(f"--{name} was {saved[name]} before, now {getattr(arguments, name)}")
