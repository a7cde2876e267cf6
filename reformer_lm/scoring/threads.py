"""Batches that run side by side on a CPU, each on its share of the threads.

A batch of short texts is many small operations, which gain little from being divided; between two of them there is
Python. Several batches at a time keep the processor busy: each result is what it is alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from reformer_lm.model import ReformerLMForCausalLM
from reformer_lm.scoring.batches import Batch
from reformer_lm.scoring.forward import TokenScores, score_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Each batch that runs holds its activations and a chunk of logits, some tens of megabytes.
MOST_BATCHES_AT_A_TIME = 8


def score_batches(model: PreTrainedModel, batches: Sequence[Batch], alternatives: int) -> Iterator[list[TokenScores]]:
    """Run batches with `score_batch`.

    Args:
        model: A causal language model in evaluation mode. Models of other packages, and those on a GPU, run one batch
            after the other.
        batches: What to run.
        alternatives: See `score_batch`.

    Yields:
        What `score_batch` returns, in the order of the batches.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(batches), MOST_BATCHES_AT_A_TIME)
    if workers < 2 or not isinstance(model, ReformerLMForCausalLM) or model.device.type != "cpu":
        for batch in batches:
            yield score_batch(model, batch, alternatives)
        return

    def run(batch: Batch) -> list[TokenScores]:
        # Whether there are gradients is a setting of each thread.
        with torch.no_grad():
            return score_batch(model, batch, alternatives)

    # The number of threads is a setting of each thread, too, but for some libraries below torch: it is set again after.
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,))
    try:
        # The longest first: what is left at the end, when a worker has nothing more to do, is little.
        futures = [pool.submit(run, batch) for batch in reversed(batches)]
        for future in reversed(futures):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
