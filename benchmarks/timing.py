"""Several calls timed side by side in one process."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def seconds_of(call: Callable[[], Any], device: str) -> float:
    """Seconds of one call; on CUDA until its last kernel has finished."""
    if device == "cuda":
        # Other contenders may have driven this one's blocks out of the allocator's cache: call it once untimed.
        call()
        torch.cuda.synchronize()
    begin = time.perf_counter()
    result = call()
    if device == "cuda":
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - begin
    del result
    return elapsed


def measure_times(
    calls: dict[str, Callable[[], Any]],
    repetitions: int,
    device: str,
    warm_ups: dict[str, Callable[[], Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Times all calls in rounds, after one round that does not count; the order rotates.

    Args:
        calls: by name.
        repetitions: rounds that count.
        device: "cpu" or "cuda".
        warm_ups: by name, what is called in the round that does not count; the calls themselves if not given.

    Returns:
        By name: all samples, their median, least and largest, and the warm-up call, in seconds.
    """
    warm_up = {name: seconds_of(call, device) for name, call in (warm_ups or calls).items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for repetition in range(repetitions):
        first = repetition % len(names)
        gc.collect()
        for name in names[first:] + names[:first]:
            samples[name].append(seconds_of(calls[name], device))
    return {
        name: {
            "seconds": taken,
            "median_s": statistics.median(taken),
            "min_s": min(taken),
            "max_s": max(taken),
            "warm_up_s": warm_up[name],
        }
        for name, taken in samples.items()
    }
