"""docs/scaling.md: its tables are what its arithmetic prints, and its measurement is that of the result file."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


@functools.cache
def run_the_arithmetic() -> tuple[dict[str, object], str]:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    namespace: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(block, "docs/scaling.md", "exec"), namespace)
    return namespace, printed.getvalue()


def test_the_tables_are_what_the_arithmetic_prints() -> None:
    _, printed = run_the_arithmetic()
    parts = [part for part in printed.strip().split("\n\n") if part]
    assert len(parts) == 6
    after = PAGE.split("```")[-1]
    assert [part for part in parts if part not in after] == []


def test_the_parts_of_the_plan_agree_with_their_sums() -> None:
    plan, _ = run_the_arithmetic()
    total, layer, root = plan["total"], plan["layer"], plan["root"]
    assert 1.25e9 < total < 1.35e9
    assert total == 24 * layer + root
    # All states of all cards together hold what one process would, but for what the methods need besides.
    weights, gradients, adamw, _ = plan["states"]["FSDP2 (ZeRO-3)"]
    assert 8 * (weights + gradients + adamw) == 16 * total
    assert sum(plan["states"]["DDP"][:3]) == 16 * total
    # Zero redundancy: every byte of ZeRO-2 that is sharded is an eighth.
    assert sum(plan["states"]["ZeRO-2"][1:3]) == (2 + 12) * total / 8


def test_the_measurement_is_that_of_the_result_file() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "memory_amd_epyc_avx2.json").read_text(encoding="utf-8"))
    (run,) = [
        run
        for run in results["rows"]
        if run["tokens"] == 65536 and run["contender"] == "ours" and run["hidden_size"] == 512 and run["depth"] == 6
    ]
    plan, _ = run_the_arithmetic()
    # A gradient and two moments a parameter, all float32.
    states = 3 * run["parameter_bytes"]
    planes = (run["bytes"] - states) / (4 * 65536 * 512)
    words = " ".join(PAGE.split())
    assert f"has {run['bytes'] / 1e9:.2f} GB above the model" in words
    assert f"gradients and AdamW are {states / 1e9:.2f}" in words
    assert f"What remains is {planes:.1f} tensors" in words
    assert f"would be {planes * plan['plane'] / 1e9:.1f} GB" in words
    assert f"says {plan['working'] / 1e9:.1f}" in words
