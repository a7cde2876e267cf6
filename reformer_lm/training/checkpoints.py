"""Checkpoints that are whole or not there.

    output_dir/
      config.json, model.safetensors, ...      the newest saved model, for predict.py and for other tools
      training_state.pt                        what --resume needs besides the model
      checkpoints/step-00000040/               the same files, as of step 40; the last few and the best are kept
      best/                                    the model of the checkpoint with the lowest validation loss

A checkpoint is written to a folder of another name and renamed; one that goes is renamed first and then removed. So at
every moment each folder named for a step is whole. The files in ``output_dir`` itself and in ``best`` are links where
the file system can, so they cost no space.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from reformer_lm.errors import InputError

STATE_NAME = "training_state.pt"
BEST_NAME = "best"
KEPT = 2
_STEP_FOLDER = re.compile(r"step-(\d{8,})")


class CheckpointStore:
    """The checkpoints of one output folder.

    Args:
        output_dir: The folder; it is made by `require_writable_folder`.
        kept: How many checkpoints stay, besides the best.
        replace_beyond: Checkpoints of later steps than this that are there already belong to another run, and go with
            the first save (not before, so that a run that never saves destroys nothing). None: all belong to this one.
    """

    def __init__(self, output_dir: str | Path, kept: int = KEPT, *, replace_beyond: int | None = None) -> None:
        self.output_dir = Path(output_dir)
        self.folder = self.output_dir / "checkpoints"
        self.kept = kept
        self._replace_beyond = replace_beyond

    def complete(self) -> list[Path]:
        """Folders of the complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        steps = {path: _STEP_FOLDER.fullmatch(path.name) for path in self.folder.iterdir()}
        return sorted((path for path, match in steps.items() if match), key=step_of)

    def newest(self) -> Path | None:
        """Folder of the newest complete checkpoint, None if there is none."""
        complete = self.complete()
        if complete:
            return complete[-1]
        # Someone removed the checkpoints to save space; the final model has the same files.
        return self.output_dir if (self.output_dir / STATE_NAME).is_file() else None

    def of_step(self, step: int) -> Path:
        """The folder that a step's checkpoint has or would have."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, write: Callable[[Path], None], best_step: int | None = None) -> Path:
        """Write a checkpoint, make it the output folder's model, and remove the oldest ones.

        Args:
            step: Optimizer steps done.
            write: Writes all files into the folder that it is given.
            best_step: The step with the lowest validation loss so far, whose checkpoint stays if there is one.

        Returns:
            The checkpoint's folder.

        Raises:
            InputError: If it cannot be written. What was saved before stays whole.
        """
        final = self.of_step(step)
        partial = final.with_name(final.name + ".partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clean()
            partial.mkdir()
            try:
                write(partial)
                for path in partial.iterdir():
                    _flush(path)
                others = self._replace_beyond
                if others is not None:
                    # The earlier run must not be what a run that is killed right here would continue.
                    (self.output_dir / STATE_NAME).unlink(missing_ok=True)
                    shutil.rmtree(self.output_dir / BEST_NAME, ignore_errors=True)
                for path in self.complete():
                    if path == final or (others is not None and step_of(path) > others):
                        _retire(path)
                partial.rename(final)
                _flush(self.folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            self._replace_beyond = None
            self._settle(final, best_step)
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise InputError(
                f"{final}: the checkpoint cannot be saved ({reason}); make room there, then continue with --resume"
            ) from error
        return final

    def _clean(self) -> None:
        """Remove what a killed run left half written or half removed."""
        for pattern in ("*.partial", "*.removed"):
            for leftover in self.folder.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)

    def settle(self, checkpoint: Path, best_step: int | None) -> None:
        """Do what a kill may have prevented after the newest checkpoint was there; without one, nothing is left to do.

        Args:
            checkpoint: That a run continues.
            best_step: As in `save`.
        """
        published = self.output_dir / STATE_NAME
        if checkpoint.parent == self.folder and not _same(published, checkpoint / STATE_NAME):
            self._settle(checkpoint, best_step)

    def _settle(self, checkpoint: Path, best_step: int | None) -> None:
        best = None if best_step is None else self.of_step(best_step)
        for path in self.complete()[: -self.kept]:
            if path != best:
                _retire(path)
        self._clean()
        if best is not None and best.is_dir():
            self._publish_best(best)
        self._publish(checkpoint)

    def _publish(self, checkpoint: Path) -> None:
        """Give the output folder the checkpoint's files, the training state last: it vouches for the rest."""
        (self.output_dir / STATE_NAME).unlink(missing_ok=True)
        for path in sorted(checkpoint.iterdir(), key=lambda path: path.name == STATE_NAME):
            _link(path, self.output_dir / path.name)

    def _publish_best(self, checkpoint: Path) -> None:
        """The model alone: who continues, continues from a checkpoint."""
        folder = self.output_dir / BEST_NAME
        folder.mkdir(exist_ok=True)
        for path in checkpoint.iterdir():
            if path.name != STATE_NAME:
                _link(path, folder / path.name)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's folder is named for."""
    return int(checkpoint.name.removeprefix("step-"))


def _same(one: Path, other: Path) -> bool:
    return one.is_file() and one.samefile(other)


def _retire(checkpoint: Path) -> None:
    """Take a checkpoint's name away before its files, so that a kill leaves no half of one."""
    removed = checkpoint.with_name(checkpoint.name + ".removed")
    shutil.rmtree(removed, ignore_errors=True)
    checkpoint.rename(removed)


def _link(source: Path, target: Path) -> None:
    partial = target.with_name(f"{target.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:
        shutil.copyfile(source, partial)
    partial.replace(target)


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write a training state: tensors and plain values only, so that reading it runs no code."""
    torch.save(state, folder / STATE_NAME)


def load_state(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's training state.

    Raises:
        InputError: If it is missing or damaged.
    """
    path = checkpoint / STATE_NAME
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(
            f"{checkpoint}: {STATE_NAME} is missing, so --resume cannot continue; "
            "start from the weights alone with --init_from"
        ) from None
    # torch, zipfile and pickle have a dozen ways to say that a file is damaged.
    except Exception as error:
        raise InputError(
            f"{path}: damaged ({type(error).__name__}); remove {checkpoint} to continue from the one before"
        ) from None
    if not isinstance(state, dict):
        raise InputError(f"{path}: is no training state; remove {checkpoint} to continue from the one before")
    return state


def require_writable_folder(path: str | Path, flag: str) -> None:
    """Make a folder and prove that files can be written there, before training spends hours.

    Permissions are not asked for but tried, since they say little on network drives or to root.

    Raises:
        InputError: If they cannot.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"\0")
            file.flush()
    except FileExistsError:
        raise InputError(f"{path}: this is a file; give a folder ({flag})") from None
    except OSError as error:
        raise InputError(f"{path}: this folder cannot be written ({error.strerror}); give another ({flag})") from None


def _flush(path: Path) -> None:
    """Bring a file or a folder's list of names onto the disk, so that a power cut leaves no empty file."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
