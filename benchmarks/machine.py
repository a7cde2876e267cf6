"""What every result file says about where it comes from."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# So that a script here finds the package without an installation: each imports this module first.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "reformer-pytorch", "numpy")


def describe_machine() -> dict[str, Any]:
    """Hardware, versions and commit, for the head of a result file.

    Returns:
        Plain values. ``commit`` ends in "-dirty" where the working tree had changes.
    """
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _commit(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        # "AVX2", "AVX512": what torch's kernels may use. Processors of one name differ here, and in bfloat16 by far.
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": versions,
    }


def default_result_file(benchmark: str, device: str) -> Path:
    """One file per benchmark and processor, with what torch uses of it, or GPU: .../attention_amd_epyc_avx2.json."""
    name = _processor() if device == "cpu" else device
    if device == "cuda" and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    # "Intel(R) Xeon(R) Processor" -> intel_xeon
    words = re.findall(r"[a-z0-9]+", re.sub(r"\((r|tm)\)|\b(cpu|processor)\b|@.*", " ", name.lower()))
    if device == "cpu":
        words.append(torch.backends.cpu.get_cpu_capability().lower())
    return RESULTS / f"{benchmark}_{'_'.join(words)}.json"


def _commit() -> str:
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
