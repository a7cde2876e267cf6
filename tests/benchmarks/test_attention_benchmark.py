"""The attention benchmark: every contender computes what it should, and what is measured arrives in file and tables."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attention
import attention_memory
import attention_peers
import attention_plots
import attention_profile
import machine
import pytest
import torch
from attention_peers import CONTENDERS, HASHES, HEAD_DIM, HEADS
from torch import Tensor
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

from reformer_lm.ops import hash_vectors, lsh_attention, sample_rotations

ROOT = Path(__file__).parents[2]
TOKENS = 256
MIB = 1 << 20


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Calls this small gain nothing from two, and wait for each other long where other tests run beside them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=list(CONTENDERS))
def name(request: pytest.FixtureRequest) -> str:
    if reason := attention_peers.why_missing(request.param):
        pytest.skip(reason)
    return request.param


def heads_first(x: Tensor) -> Tensor:
    """[H, T, D], [1, H, T, D] or [1, T, H * D] -> [H, T, D]."""
    if x.shape[-1] == HEAD_DIM:
        return x.reshape(HEADS, -1, HEAD_DIM)
    return x.squeeze(0).unflatten(-1, (HEADS, HEAD_DIM)).transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_contender_gives_an_output_and_its_gradients(name: str, dtype: torch.dtype) -> None:
    results = CONTENDERS[name].build(attention_peers.make_inputs(TOKENS, dtype, "cpu"))()
    # Output, then gradients of q, k, v or of shared queries and keys, v.
    assert len(results) == (4 if name == "sdpa" else 3)
    for x in results:
        assert x.dtype == dtype
        assert heads_first(x).shape == (HEADS, TOKENS, HEAD_DIM)
        assert torch.isfinite(x).all()
        assert x.abs().sum() > 0


def test_no_contender_reads_later_values(name: str) -> None:
    inputs = attention_peers.make_inputs(TOKENS, torch.float32, "cpu")
    # Only the first half of the outputs counts, so that later values must be without gradient.
    inputs.grad_out[:, :, TOKENS // 2 :] = 0
    grad_v = heads_first(CONTENDERS[name].build(inputs)()[-1])
    assert (grad_v[:, TOKENS // 2 :] == 0).all()
    # Nearly all of the earlier ones are read by somebody.
    assert (grad_v[:, : TOKENS // 2].abs().sum(-1) > 0).float().mean() > 0.9


def test_ours_is_lsh_attention() -> None:
    inputs = attention_peers.make_inputs(TOKENS, torch.float32, "cpu")
    out, grad_qk, grad_v = CONTENDERS["ours"].build(inputs)()
    qk, v = (x.clone().requires_grad_() for x in (inputs.q, inputs.v))
    buckets = hash_vectors(qk, sample_rotations(HEADS, HEAD_DIM, HASHES, (TOKENS // 64,), seed=0))
    expected = lsh_attention(qk, v, buckets, window=64, backend="reference")
    expected_grads = torch.autograd.grad(expected, (qk, v), inputs.grad_out)
    for actual, wanted in zip((out, grad_qk, grad_v), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-4)


def test_sdpa_is_causal_softmax_attention() -> None:
    inputs = attention_peers.make_inputs(TOKENS, torch.float32, "cpu")
    logits = inputs.q @ inputs.k.transpose(-1, -2) / HEAD_DIM**0.5
    later = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    expected = logits.masked_fill(later, -torch.inf).softmax(-1) @ inputs.v
    torch.testing.assert_close(CONTENDERS["sdpa"].build(inputs)()[0], expected, rtol=1e-4, atol=1e-5)


def test_the_peer_modules_hash_into_as_many_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("reformer_pytorch", reason="reformer-pytorch is not installed")
    from reformer_pytorch.reformer_pytorch import LSHAttention
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    found: dict[str, Tensor] = {}
    for peer, name, pick in (
        (LSHAttention, "reformer_pytorch", lambda result: result[2]),
        (LSHSelfAttention, "transformers", lambda result: result.buckets),
    ):

        def forward(self: Any, *args: Any, forward: Any = peer.forward, name: str = name, pick: Any = pick) -> Any:
            result = forward(self, *args)
            found[name] = pick(result)
            return result

        monkeypatch.setattr(peer, "forward", forward)
        CONTENDERS[name].build(attention_peers.make_inputs(1024, torch.float32, "cpu"))()
        # The rounds' buckets are numbered through: 4 rounds of 1,024 / 64.
        buckets = found[name].reshape(HEADS, HASHES, 1024)
        assert buckets.unique().tolist() == list(range(HASHES * 16))
        assert (buckets // 16 == torch.arange(HASHES).view(-1, 1)).all()


@pytest.mark.parametrize(("tokens", "factors"), [(64, (2,)), (192, (4,)), (8192, (128,)), (65536, (32, 32))])
def test_numbers_of_buckets(tokens: int, factors: tuple[int, ...]) -> None:
    assert attention_peers.bucket_factors(tokens) == factors


def test_a_length_that_does_not_fit_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="multiple of 128"):
        attention_peers.make_inputs(192, torch.float32, "cpu")
    with pytest.raises(SystemExit):
        attention.main(["--lengths", "1000"])
    assert "multiples of 128" in capsys.readouterr().err


def test_the_order_rotates_and_the_warm_up_does_not_count() -> None:
    called: list[str] = []
    calls = {name: lambda name=name: called.append(name) or () for name in "abc"}
    times = attention.measure_times(calls, 4, "cpu")
    assert "".join(called) == "abc" + "abc" + "bca" + "cab" + "abc"
    for entry in times.values():
        assert len(entry["seconds"]) == 4
        assert entry["min_s"] == min(entry["seconds"]) <= entry["median_s"] <= entry["max_s"] == max(entry["seconds"])


def test_operations_are_those_of_the_matrix_products() -> None:
    window = attention_peers.BUCKET_SIZE
    q, k, v = (torch.randn(1, n, HEAD_DIM, requires_grad=True) for n in (window, 2 * window, 2 * window))
    with FlopCounterMode(display=False) as counter:
        # Two products forward, four backward; the fifth, the logits again, replaces what autograd keeps.
        (torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)).sum().backward()
    one_block = counter.get_total_flops() // 6 * 7
    operations = attention_profile.useful_operations(4096)
    assert operations["attention"] == HEADS * HASHES * (4096 // window) * one_block
    # 64 buckets: a projection on 32 directions.
    assert operations["hashing"] == 2 * HEADS * HASHES * 4096 * HEAD_DIM * 32


@pytest.mark.parametrize(
    ("operation", "device", "group"),
    [
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "cpu", "attention kernels"),
        ("triton_tem_fused_0", "cuda", "attention kernels"),
        ("_LSHAttention", "cuda", "attention kernels"),
        ("_LSHAttention", "cpu", "views, allocation and Python"),
        ("aten::bmm", "cpu", "matrix products"),
        ("aten::masked_fill_", "cpu", "softmax and other elementwise"),
        ("aten::index_add_", "cpu", "gathers, scatters and copies"),
        ("aten::_index_put_impl_", "cpu", "gathers, scatters and copies"),
        ("aten::sort", "cpu", "sorting"),
        ("autograd::engine::evaluate_function: _LSHAttentionBackward", "cpu", "views, allocation and Python"),
        ("WhereBackward0", "cpu", "views, allocation and Python"),
        ("aten::never_heard_of", "cpu", "rest"),
        ("other::bmm", "cpu", "rest"),
    ],
)
def test_groups_of_operations(operation: str, device: str, group: str) -> None:
    assert attention_profile.group_of(operation, device) == group


def test_no_operation_stands_in_two_groups() -> None:
    names = [name for names in attention_profile.GROUPS.values() for name in names.split()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_times_are_added_up_by_group(device: str) -> None:
    def event(name: str, microseconds: float, parent: Any = None, where: DeviceType = DeviceType.CPU) -> Any:
        own, other = (microseconds, 99.0) if device == "cpu" else (99.0, microseconds)
        return SimpleNamespace(
            name=name, cpu_parent=parent, device_type=where, self_cpu_time_total=own, self_device_time_total=other
        )

    call = event("benchmark: the call", 1)
    hashing = event("benchmark: hashing", 2, call)
    projection = event("aten::matmul", 4, hashing)
    events = [
        call, hashing, projection, event("aten::bmm", 8, projection), event("aten::bmm", 16, call),
        event("aten::unheard", 32, call), event("aten::unheard", 64), event("kernel", 128, where=DeviceType.CUDA),
    ]  # fmt: skip
    seconds, rest = attention_profile.group_times(events, device)
    assert rest == pytest.approx({"aten::unheard": 96e-6})
    assert {name: value for name, value in seconds.items() if value} == pytest.approx(
        {"views, allocation and Python": 1e-6, "hashing": 14e-6, "matrix products": 16e-6, "rest": 96e-6}
    )


def test_the_profile_knows_the_operations_of_ours() -> None:
    profile = attention_profile.profile_ours(TOKENS, torch.float32, "cpu")
    assert list(profile["groups"]) == list(attention_profile.ALL_GROUPS)
    assert sum(group["share"] for group in profile["groups"].values()) == pytest.approx(1)
    # All of the call is in it: own times add up to its duration.
    assert profile["total_s"] <= profile["call_s"]
    for name in ("hashing", "sorting", "gathers, scatters and copies"):
        assert profile["groups"][name]["seconds"] > 0
    assert profile["groups"]["attention kernels"]["seconds"] + profile["groups"]["matrix products"]["seconds"] > 0


def test_peak_memory_of_a_process() -> None:
    tokens = 4096
    measured = attention_memory.peak_memory_in_process("sdpa", tokens, "float32", threads=1)
    # Output and three gradients at least; no matrix of all pairs of tokens, which would be 512 MiB.
    tensor = HEADS * tokens * HEAD_DIM * 4
    assert 4 * tensor <= measured["bytes"] + MIB
    assert measured["bytes"] < 10 * tensor


def test_an_earlier_peak_does_not_count() -> None:
    torch.ones(50 * MIB)  # 200 MiB, freed at once
    earlier = attention_memory.kibibytes("/proc/self/status", "VmHWM")
    if not attention_memory.reset_peak():
        pytest.skip("this system does not let a process reset its peak; results then say that they are upper bounds")
    assert attention_memory.kibibytes("/proc/self/status", "VmHWM") < earlier - 150 * 1024


def run(folder: Path, *more: str) -> dict[str, Any]:
    out = folder / "attention.json"
    attention.main(
        ["--lengths", "256", "384", "--dtypes", "float32", "--repetitions", "1", "--profile_lengths", "256",
         "--ceiling_size", "64", "--out", str(out), *more]
    )  # fmt: skip
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.fixture
def quick_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of a process per call, which `test_peak_memory_of_a_process` starts."""
    monkeypatch.setattr(
        attention_memory, "peak_memory_in_process", lambda name, tokens, *_: {"bytes": MIB * tokens, "exact": True}
    )


@pytest.mark.usefixtures("quick_memory")
def test_file_tables_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    # One that is not there, and one that needs too much.
    absent = CONTENDERS["transformers"]._replace(module="no_such_module", package="no-such-package")
    monkeypatch.setitem(CONTENDERS, "transformers", absent)
    results = run(tmp_path, "--longest", "sdpa=256")
    assert "transformers' Reformer: skipped, no-such-package is not installed" in capsys.readouterr().out
    assert results["machine"]["versions"]["torch"] == torch.__version__
    assert results["device"] == "cpu"
    assert results["settings"]["repetitions"] == 1
    assert list(results["contenders"]) == list(CONTENDERS)
    assert results["contenders"]["transformers"]["missing"] is not None
    assert results["contenders"]["ours"] == {"label": "ours", "work": CONTENDERS["ours"].work, "missing": None}
    short, long = results["groups"]
    for group in (short, long):
        assert group["dtype"] == "float32"
        assert group["commit"] == results["machine"]["commit"]
        assert group["ceiling"]["best_gflops"] == max(group["ceiling"]["gflops"]) > 0
        assert group["useful_operations"] == attention_profile.useful_operations(group["tokens"])
        entry = group["contenders"]["ours"]
        assert entry["memory_bytes"] == [MIB * group["tokens"]] * 3
        assert entry["memory_median_bytes"] == MIB * group["tokens"]
        assert entry["memory_exact"]
        assert len(entry["seconds"]) == 1
        assert 0 < entry["min_s"] == entry["median_s"] == entry["max_s"]
        assert entry["warm_up_s"] > 0
        assert group["contenders"]["transformers"]["cause"] == "missing"
    assert "seconds" in short["contenders"]["sdpa"]
    assert long["contenders"]["sdpa"] == {"not_run": "not asked for beyond 256 tokens", "cause": "asked"}
    (profile,) = results["profiles"]
    assert (profile["dtype"], profile["tokens"]) == ("float32", 256)

    tables = attention_plots.report(results)
    ours = attention_plots.format_seconds(short["contenders"]["ours"]["median_s"])
    assert f"| 256 | **{ours}** |" in tables
    assert "| 384 | **384 MiB** |" in tables
    assert "- full attention (SDPA), 384 tokens and more: not asked for beyond 256 tokens." in tables
    for heading in ("time", "peak memory", "share of the matrix-multiplication ceiling", "what the time"):
        assert f"### float32: {heading}" in tables

    arguments = ["--report", "--plot", "--out", str(tmp_path / "attention.json"), "--images", str(tmp_path / "images")]
    attention.main(arguments)
    assert tables in capsys.readouterr().out
    picture = tmp_path / "images" / "attention_float32.png"
    assert [path.name for path in picture.parent.iterdir()] == [picture.name]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000


@pytest.mark.usefixtures("quick_memory")
def test_what_is_in_the_file_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--contenders", "sdpa")
    first = run(tmp_path, *options)
    # An interrupted run: the second length is missing.
    missing = first["groups"].pop()
    (tmp_path / "attention.json").write_text(json.dumps(first), encoding="utf-8")
    second = run(tmp_path, *options)
    assert second["groups"][0] == first["groups"][0]
    assert second["groups"][1]["tokens"] == missing["tokens"]
    assert second["groups"][1] != missing
    third = run(tmp_path, *options, "--fresh")
    assert len(third["groups"]) == 2
    assert third["groups"][0] != first["groups"][0]
    # Measuring one length again loses none of the others.
    fourth = run(tmp_path, *options, "--fresh", "--lengths", "256")
    assert {group["tokens"]: group == third["groups"][0] for group in fourth["groups"]} == {256: False, 384: False}
    assert third["groups"][1] in fourth["groups"]

    monkeypatch.setattr(attention, "describe_machine", lambda: first["machine"] | {"processor": "another"})
    with pytest.raises(SystemExit, match="another processor"):
        run(tmp_path, *options)


def test_too_large_or_too_slow_is_not_run_at_longer_lengths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def memory(name: str, tokens: int, *_: Any) -> dict[str, Any]:
        too_large = name == "reformer_pytorch" and tokens == 256
        return {"out_of_memory": "tried too much"} if too_large else {"bytes": MIB, "exact": True}

    monkeypatch.setattr(attention_memory, "peak_memory_in_process", memory)
    monkeypatch.setattr(attention, "why_missing", lambda name: None)
    options = ("--contenders", "reformer_pytorch", "sdpa", "--call_limit_s", "0")
    short, long = run(tmp_path, *options)["groups"]
    assert short["contenders"]["reformer_pytorch"] == {"not_run": "out of memory: tried too much", "cause": "memory"}
    assert long["contenders"]["reformer_pytorch"] == {"not_run": "out of memory at 256 tokens", "cause": "memory"}
    assert "seconds" in short["contenders"]["sdpa"]
    assert long["contenders"]["sdpa"]["cause"] == "time"
    assert "at 256 tokens, over the limit of 0 s" in long["contenders"]["sdpa"]["not_run"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.002824, "2.82 ms"), (0.02824, "28.2 ms"), (0.2824, "282 ms"), (0.9996, "1.00 s"), (104.2, "104 s")],
)
def test_seconds_in_words(value: float, text: str) -> None:
    assert attention_plots.format_seconds(value) == text


@pytest.mark.parametrize(
    ("mebibytes", "text"), [(0.5, "0.50 MiB"), (34.04, "34.0 MiB"), (640, "640 MiB"), (1536, "1.50 GiB")]
)
def test_bytes_in_words(mebibytes: float, text: str) -> None:
    assert attention_plots.format_bytes(mebibytes * MIB) == text


def test_ticks() -> None:
    assert [attention_plots.format_tokens(tokens) for tokens in (256, 1024, 65536)] == ["256", "1k", "64k"]


@pytest.mark.parametrize(
    ("processor", "name"),
    [
        ("Intel(R) Xeon(R) Processor", "intel_xeon"),
        ("Intel(R) Core(TM) i7-8700 CPU @ 3.20GHz", "intel_core_i7_8700"),
        ("AMD EPYC", "amd_epyc"),
    ],
)
def test_a_result_file_per_processor(monkeypatch: pytest.MonkeyPatch, processor: str, name: str) -> None:
    monkeypatch.setattr(machine, "_processor", lambda: processor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert machine.default_result_file("attention", "cpu").name == f"attention_{name}_avx2.json"


def test_the_page_shows_the_result_files() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    files = sorted((ROOT / "benchmarks" / "results").glob("attention_*.json"))
    assert files
    for path in files:
        assert attention_plots.report(json.loads(path.read_text(encoding="utf-8"))).strip() in page
        assert f"images/{path.stem}_float32.png" in page
