"""Checkpoints that are whole or not there.

    output_dir/
      config.json, model.safetensors, ...      the newest saved model, for predict.py and for other tools
      training_state.pt                        what --resume needs besides the model
      checkpoints/step-00000040/               the same files, as of step 40; the last few are kept

A checkpoint is written to a folder of another name and renamed. The files in ``output_dir`` itself are the
newest checkpoint's, linked where the file system can, so they cost no space.
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
KEPT = 2
_STEP_FOLDER = re.compile(r"step-(\d{8,})")


class CheckpointStore:
    """The checkpoints of one output folder.

    Args:
        output_dir: The folder; it is made by `require_writable_folder`.
        kept: How many checkpoints stay.
        replace_earlier_run: Whether checkpoints that are there already belong to another run, and go with the
            first save (not before, so that a run that never saves destroys nothing).
    """

    def __init__(self, output_dir: str | Path, kept: int = KEPT, *, replace_earlier_run: bool = False) -> None:
        self.output_dir = Path(output_dir)
        self.folder = self.output_dir / "checkpoints"
        self.kept = kept
        self._replace_earlier_run = replace_earlier_run

    def complete(self) -> list[Path]:
        """Folders of the complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        steps = {path: _STEP_FOLDER.fullmatch(path.name) for path in self.folder.iterdir()}
        return sorted((path for path, match in steps.items() if match), key=lambda path: int(path.name[5:]))

    def newest(self) -> Path | None:
        """Folder of the newest complete checkpoint, None if there is none."""
        complete = self.complete()
        if complete:
            return complete[-1]
        # Someone removed the checkpoints to save space; the final model has the same files.
        return self.output_dir if (self.output_dir / STATE_NAME).is_file() else None

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Write a checkpoint, make it the output folder's model, and remove the oldest ones.

        Args:
            step: Optimizer steps done.
            write: Writes all files into the folder that it is given.

        Returns:
            The checkpoint's folder.

        Raises:
            InputError: If it cannot be written. What was saved before stays whole.
        """
        final = self.folder / f"step-{step:08d}"
        partial = final.with_name(final.name + ".partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob("*.partial"):
                shutil.rmtree(leftover)
            partial.mkdir()
            try:
                write(partial)
                for path in partial.iterdir():
                    _flush(path)
                earlier = [path for path in self.complete() if self._replace_earlier_run or path == final]
                if final in earlier:
                    shutil.rmtree(final)
                    earlier.remove(final)
                partial.rename(final)
                _flush(self.folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            self._replace_earlier_run = False
            for path in [*earlier, *self.complete()[: -self.kept]]:
                shutil.rmtree(path, ignore_errors=True)
            self._publish(final)
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise InputError(
                f"{final}: the checkpoint cannot be saved ({reason}); make room there, then continue with --resume"
            ) from error
        return final

    def _publish(self, checkpoint: Path) -> None:
        """Give the output folder the checkpoint's files, the training state last: it vouches for the rest."""
        (self.output_dir / STATE_NAME).unlink(missing_ok=True)
        for path in sorted(checkpoint.iterdir(), key=lambda path: path.name == STATE_NAME):
            partial = self.output_dir / f"{path.name}.partial"
            partial.unlink(missing_ok=True)
            try:
                os.link(path, partial)
            except OSError:
                shutil.copyfile(path, partial)
            partial.replace(self.output_dir / path.name)


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
            "start from the weights alone with --pretrained_model"
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
