"""The resident memory of this process: its peak between two moments, and a limit that fails instead of swapping."""

from __future__ import annotations

import re
import resource
from pathlib import Path

# Of the memory the machine has free; the rest is for everything else that runs.
USABLE = 0.9
OUT_OF_MEMORY = re.compile("allocate memory|bad_alloc|out of memory", re.IGNORECASE)


def in_short(error: Exception) -> str:
    """What was tried to allocate, without addresses and advice."""
    found = re.search(r"tried to allocate [\d.]+ \w+", str(error))
    return found.group() if found else type(error).__name__


def kibibytes(path: str, field: str) -> int:
    """One number of /proc/self/status or /proc/meminfo."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path(path).read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return int(found.group(1))


def reset_peak() -> bool:
    """Makes the kernel count this process's peak of resident memory (VmHWM) anew; False where that is not allowed.

    The peak that getrusage reports (ru_maxrss) covers the whole life of the process, loading of the libraries included.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def limit_to_what_is_free() -> None:
    """From here on an allocation beyond the machine's memory fails, instead of waking the kernel's killer."""
    limit = kibibytes("/proc/self/status", "VmSize") + int(USABLE * kibibytes("/proc/meminfo", "MemAvailable"))
    resource.setrlimit(resource.RLIMIT_AS, (limit * 1024, limit * 1024))
