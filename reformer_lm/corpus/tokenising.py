"""Tokenise a corpus block by block: in several processes, and so that a killed run is continued."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from reformer_lm.corpus.blocks import BlockFolder, BlockOfArticles, BlockRecord, cut_into_blocks
from reformer_lm.corpus.sources import CorpusSource, Place
from reformer_lm.errors import InputError
from reformer_lm.text import ArticleEncoder

if sys.platform != "win32":
    import fcntl

# A process takes seconds to start, in which one that runs already tokenises this much.
BYTES_WORTH_A_PROCESS = 256 << 20


def choose_workers(size: int) -> int:
    """How many processes to tokenise a corpus in.

    Args:
        size: Of the corpus, in bytes.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, size // BYTES_WORTH_A_PROCESS))


def tokenise(
    source: CorpusSource,
    tokenizer: PreTrainedTokenizerFast,
    folder: BlockFolder,
    min_length: int,
    workers: int,
    show_progress: bool = False,
    on_resume: Callable[[int], object] | None = None,
) -> list[BlockRecord]:
    """Tokenise a corpus into a folder of blocks; those that are there already are kept.

    Args:
        source: The corpus.
        tokenizer: Makes the ids.
        folder: Empty, or with blocks of the same source, tokenizer and settings.
        min_length: Articles of so many characters or fewer are dropped.
        workers: Processes; 1 is this one.
        show_progress: Draw a bar on stderr.
        on_resume: Told how many articles were there already, if any.

    Returns:
        The records of all blocks, in order.

    Raises:
        InputError: If the corpus cannot be read, or a process dies.
        OSError: If the folder cannot be written.
    """
    records = folder.read_records()
    first = next(number for number in count() if number not in records)
    if records and on_resume is not None:
        on_resume(sum(record.num_articles + record.num_dropped for record in records.values()))
    start = records[first - 1].end if first else Place()
    number = first
    bar = tqdm(
        total=source.size,
        disable=not show_progress,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        desc="tokenising",
        smoothing=0.05,
    )
    with bar, _Workers(workers, tokenizer, folder, records) as crew:
        for block in cut_into_blocks(source, start, tokenizer, min_length, bar.update):
            if number not in records:
                crew.take(number, block)
            number += 1
        crew.finish()
    return [records[block] for block in range(number)]


@contextmanager
def work_folder(path: Path, key: str) -> Iterator[Path]:
    """A folder for unfinished work, for one process at a time.

    What another source, tokenizer or setting left there is removed. A folder below it bears the key's name, so that
    a process which outlives its killed parent for a moment cannot write into other work.

    Args:
        path: The folder; it stays after an error, to be continued, and is removed after success.
        key: A checksum of what the work depends on.

    Raises:
        InputError: If another process is working there.
    """
    path.mkdir(parents=True, exist_ok=True)
    with (path / "lock").open("wb") as lock:
        try:
            # The system lets go of it when the process ends, however it ends.
            if sys.platform != "win32":
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{path}: another run is tokenising there; wait for it, or give another --tokenized_data_path"
            ) from None
        for entry in path.iterdir():
            if entry.name not in ("lock", key):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        (path / key).mkdir(exist_ok=True)
        yield path / key
        shutil.rmtree(path, ignore_errors=True)


class _Workers:
    """Processes that tokenise blocks; with one worker there is none besides this.

    Each has a pipe of its own, whose end it sees when this process dies.

    Args:
        workers: How many.
        tokenizer: Makes the ids.
        folder: Where the blocks go.
        records: Filled with what is known of each block.
    """

    def __init__(
        self, workers: int, tokenizer: PreTrainedTokenizerFast, folder: BlockFolder, records: dict[int, BlockRecord]
    ) -> None:
        self._folder = folder
        self._records = records
        self._tokenizer = tokenizer
        self._encoder = ArticleEncoder(tokenizer) if workers == 1 else None
        self._limit = workers
        self._processes: dict[Connection, BaseProcess] = {}
        self._busy: list[Connection] = []
        methods = multiprocessing.get_all_start_methods()
        # Never a plain fork: this process has threads. A server that has imported torch once forks cheaply.
        self._context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            self._context.set_forkserver_preload([__name__])

    def __enter__(self) -> _Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the processes, at once if something went wrong; what they have written stays."""
        for connection, process in self._processes.items():
            if kind is not None:
                process.terminate()
            connection.close()
        for process in self._processes.values():
            process.join()
        if self._processes:
            _stop_server()

    def take(self, number: int, block: BlockOfArticles) -> None:
        """Have a block tokenised, waiting until somebody is free to."""
        if self._encoder is not None:
            self._records[number] = self._folder.write(number, block, self._encoder)
            return
        if len(self._processes) < self._limit:
            worker = self._start()
        else:
            if len(self._busy) == len(self._processes):
                self._hear()
            worker = next(connection for connection in self._processes if connection not in self._busy)
        try:
            worker.send((number, block))
        except OSError:
            self._died()
        self._busy.append(worker)

    def finish(self) -> None:
        """Wait for all blocks."""
        while self._busy:
            self._hear()

    def _start(self) -> Connection:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, self._tokenizer, self._folder), daemon=True)
        process.start()
        theirs.close()
        self._processes[ours] = process
        return ours

    def _hear(self) -> None:
        """Wait until a process has done its block, and hear how it went."""
        for connection in wait(self._busy):
            assert isinstance(connection, Connection)
            try:
                number, outcome = connection.recv()
            except (EOFError, OSError):
                self._died()
            self._busy.remove(connection)
            if isinstance(outcome, Exception):
                raise outcome
            self._records[number] = outcome

    def _died(self) -> NoReturn:
        raise InputError(
            "a tokenising process was killed, perhaps for want of memory; run again (what is done is kept) "
            "with fewer --workers"
        ) from None


def _stop_server() -> None:
    """End the server that forked the processes: hundreds of megabytes that the training to come can use.

    There is no public way; where the private one is gone, the server stays until the end.
    """
    stop = getattr(getattr(forkserver, "_forkserver", None), "_stop", None)
    if stop is not None:
        stop()


def _work(connection: Connection, tokenizer: PreTrainedTokenizerFast, folder: BlockFolder) -> None:
    """What a process does: tokenise each block that comes, and answer with its number and its record or the error."""
    # Ctrl-C reaches all processes; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The processes are the parallelism.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encoder = ArticleEncoder(tokenizer)
    while True:
        try:
            number, block = connection.recv()
        except (EOFError, OSError):
            return
        outcome: BlockRecord | Exception
        try:
            outcome = folder.write(number, block, encoder)
        except Exception as error:
            # Whatever it is, the parent raises it.
            outcome = error
        try:
            connection.send((number, outcome))
        except OSError:
            return
