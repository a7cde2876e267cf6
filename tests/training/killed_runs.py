"""Runs that can be killed: a process that has imported everything forks one for each run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType

# The forking process itself computes nothing with torch, whose threads would not survive a fork.
FORKING = """
import json, os, signal, sys
import torch
from reformer_lm.training import main

EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.link", "os.mkdir")


def kill_at(place, folder):
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        if event in EVENTS and folder in str(arguments[0]):
            seen += 1
            if seen == place:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return lambda: seen


torch.set_num_threads(1)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        seen = kill_at(job["place"], job["folder"])
        status = main(job["arguments"])
        sys.stdout.flush()
        with open(job["log"] + ".events", "w") as file:
            file.write(str(seen()))
        os._exit(status)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def environment() -> dict[str, str]:
    """For programs that run elsewhere and import this package."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}


class KillableRuns:
    """Starts train_reformer.py's main in processes of their own, one after the other.

    Args:
        folder: The current folder of the runs.
    """

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log.txt"
        self._process = subprocess.Popen(
            [sys.executable, "-c", FORKING],
            cwd=folder, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._child: int | None = None

    def __enter__(self) -> KillableRuns:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._child is not None:
            self.kill()
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def start(self, arguments: list[str], *, place: int = 0, folder: str = "checkpoints") -> None:
        """Begin a run; with ``place`` it kills itself at that file operation in paths that contain ``folder``."""
        assert self._process.stdin is not None and self._process.stdout is not None
        job = {"arguments": arguments, "place": place, "folder": folder, "log": str(self.log)}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        self._child = int(self._process.stdout.readline())

    def kill(self) -> None:
        """SIGKILL, if the run has not ended."""
        assert self._child is not None
        os.kill(self._child, signal.SIGKILL)

    def wait(self) -> int:
        """The exit status; minus the signal's number if a signal ended the run."""
        assert self._process.stdout is not None
        status = int(self._process.stdout.readline())
        self._child = None
        return status

    def run(self, arguments: list[str], *, place: int = 0, folder: str = "checkpoints") -> int:
        """A whole run's exit status."""
        self.start(arguments, place=place, folder=folder)
        return self.wait()

    def events(self) -> int:
        """File operations that the last run counted."""
        return int(Path(f"{self.log}.events").read_text())
