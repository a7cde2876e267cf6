"""Peak memory of one attention call, for benchmarks/attention.py.

On the CPU each call has a process of its own, which runs this file: `attention_memory.py NAME TOKENS TYPE THREADS`.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from attention_peers import CONTENDERS, DTYPES, make_inputs
from machine import ROOT
from process_memory import OUT_OF_MEMORY, USABLE, in_short, kibibytes, limit_to_what_is_free, reset_peak

WARM_UP_TOKENS = 256
METHOD = {
    "cpu": "In a fresh process per call: inputs built, one call at 256 tokens to load the libraries, then the peak of "
    "the resident memory (VmHWM, reset through /proc/self/clear_refs) during one call, less what was resident before. "
    "Resident memory and not allocations, since that is what a machine runs out of. Output and gradients count.",
    "cuda": "torch.cuda.max_memory_allocated during a call, the first at that length aside, less what stood before.",
}


def peak_memory_here(name: str, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """Peak resident memory of one call on the CPU above what stood before; for a process that does nothing else.

    Returns:
        "bytes" and whether the peak could be reset ("exact"; if not, an earlier peak may have been higher and the
        figure is an upper bound), or "out_of_memory" with the allocator's message.
    """
    contender = CONTENDERS[name]
    contender.build(make_inputs(WARM_UP_TOKENS, dtype, "cpu"))()
    call = contender.build(make_inputs(tokens, dtype, "cpu"))
    gc.collect()
    limit_to_what_is_free()
    exact = reset_peak()
    before = kibibytes("/proc/self/status", "VmRSS")
    try:
        result = call()
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        return {"out_of_memory": in_short(error)}
    peak = kibibytes("/proc/self/status", "VmHWM")
    del result
    return {"bytes": (peak - before) * 1024, "exact": exact}


def peak_memory_in_process(name: str, tokens: int, dtype: str, threads: int) -> dict[str, Any]:
    """`peak_memory_here` in a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), name, str(tokens), dtype, str(threads)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if process.returncode:
        # Not every allocation is made where an exception could be raised.
        if process.returncode == -9 or OUT_OF_MEMORY.search(process.stderr):
            return {"out_of_memory": "the process ended"}
        raise SystemExit(f"error: memory of {name} at {tokens} tokens could not be measured:\n{process.stderr}")
    return json.loads(process.stdout.splitlines()[-1])


def peak_memory_on_cuda(name: str, tokens: int, dtype: torch.dtype, repetitions: int) -> list[dict[str, Any]]:
    """Peak of the CUDA allocator during one call above what stood before, several times."""
    measured: list[dict[str, Any]] = []
    try:
        call = CONTENDERS[name].build(make_inputs(tokens, dtype, "cuda"))
        # What is set up once per length (compiled kernels, workspaces) is not the call's.
        call()
        for _ in range(repetitions):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            result = call()
            torch.cuda.synchronize()
            measured.append({"bytes": torch.cuda.max_memory_allocated() - before, "exact": True})
            del result
    except torch.cuda.OutOfMemoryError as error:
        measured.append({"out_of_memory": in_short(error)})
    torch.cuda.empty_cache()
    return measured


def measure_memory(name: str, tokens: int, dtype: str, device: str, repetitions: int) -> dict[str, Any]:
    """Peak memory of one contender, or why it cannot be timed either.

    Args:
        name: a key of CONTENDERS.
        tokens: T.
        dtype: a key of DTYPES.
        device: "cpu" or "cuda".
        repetitions: how often; 0 measures nothing.

    Returns:
        "memory_bytes" (all samples), "memory_median_bytes" and "memory_exact", or "not_run" and "cause".
    """
    if device == "cuda":
        measured = peak_memory_on_cuda(name, tokens, DTYPES[dtype], repetitions)
    else:
        measured = []
        for _ in range(repetitions):
            measured.append(peak_memory_in_process(name, tokens, dtype, torch.get_num_threads()))
            if "out_of_memory" in measured[-1]:
                break
    for one in measured:
        if "out_of_memory" in one:
            return {"not_run": f"out of memory: {one['out_of_memory']}", "cause": "memory"}
    if not measured:
        return {"memory_bytes": [], "memory_median_bytes": None, "memory_exact": None}
    taken = [one["bytes"] for one in measured]
    median = statistics.median(taken)
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else 1024 * kibibytes("/proc/meminfo", "MemAvailable")
    if median > USABLE * free:
        # Beside the other contenders' inputs it could end the whole run.
        return {"not_run": f"out of memory: needs {median / 2**30:.1f} GiB, more than is free", "cause": "memory"}
    return {
        "memory_bytes": taken,
        "memory_median_bytes": median,
        "memory_exact": all(one["exact"] for one in measured),
    }


def main() -> None:
    """Measures one call in this process and prints the result as JSON."""
    name, tokens, dtype, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(json.dumps(peak_memory_here(name, int(tokens), DTYPES[dtype])))


if __name__ == "__main__":
    main()
