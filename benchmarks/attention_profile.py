"""What our attention call spends its time on, and how near it comes to the machine's matrix multiplication.

Used by benchmarks/attention.py.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from attention_peers import BUCKET_SIZE, HASHES, HEAD_DIM, HEADS, bucket_factors, make_inputs, ours_in_steps
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

_CALL = "benchmark: the call"
_HASHING = "benchmark: hashing"

# Operation names without "aten::" and without the underscore of in-place forms -> group. What is not found here is
# counted as "rest" and listed by name.
GROUPS: dict[str, str] = {
    "attention kernels": """
        _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention_for_cpu_backward
        _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_backward
        _scaled_dot_product_efficient_attention _scaled_dot_product_efficient_attention_backward
        _scaled_dot_product_cudnn_attention _scaled_dot_product_cudnn_attention_backward
        _flash_attention_forward _flash_attention_backward _efficient_attention_forward _efficient_attention_backward
        scaled_dot_product_attention _scaled_dot_product_attention_math
        """,
    "matrix products": "mm bmm addmm baddbmm addbmm matmul einsum linear dot mv addmv",
    "softmax and other elementwise": """
        softmax _softmax _softmax_backward_data log_softmax _log_softmax logsumexp _logsumexp exp exp2 log log2 log1p
        expm1 logaddexp sigmoid tanh add sub rsub mul div neg abs pow square sqrt rsqrt reciprocal addcmul addcdiv lerp
        sum mean amax amin max min maximum minimum argmax argmin clamp clamp_min clamp_max norm linalg_vector_norm where
        masked_fill eq ne lt le gt ge logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not any all
        remainder floor_divide triu tril isfinite isinf isnan threshold_backward
        """,
    "gathers, scatters and copies": """
        gather gather_backward take_along_dim index index_select index_select_backward index_add index_copy index_put
        _index_put_impl _unsafe_index embedding embedding_backward embedding_dense_backward scatter scatter_add
        scatter_reduce take put cat _cat stack copy _to_copy to clone contiguous constant_pad_nd pad repeat
        repeat_interleave flip roll fill zero zeros zeros_like new_zeros ones ones_like full full_like slice_backward
        select_backward masked_select masked_scatter nonzero
        """,
    "sorting": """
        sort argsort msort topk searchsorted bucketize cummax cummin _cummax_helper _cummin_helper cumsum bincount histc
        unique
        """,
    "views, allocation and Python": """
        view reshape _reshape_alias _unsafe_view as_strided unflatten flatten transpose t permute movedim swapaxes
        expand expand_as view_as squeeze unsqueeze slice select split split_with_sizes chunk narrow unfold unbind
        unsafe_split unsafe_chunk detach alias result_type lift_fresh resize set empty empty_like empty_strided
        new_empty new_empty_strided arange scalar_tensor item _local_scalar_dense resolve_conj resolve_neg numpy_T numel
        broadcast_tensors broadcast_to resize_as promote_types can_cast
        """,
}  # fmt: skip
_PYTHON = "views, allocation and Python"
# Names that end in numbers or sizes, by how they begin: what torch.compile makes ("tem" are its attention templates),
# nodes of the graph, and the marks that this file sets.
_PREFIXES = (
    ("triton_tem", "attention kernels"),
    ("triton_", "softmax and other elementwise"),
    ("Torch-Compiled Region", _PYTHON),
    ("CompiledFunction", _PYTHON),
    ("## Call Compiled", _PYTHON),
    ("TorchDynamo", _PYTHON),
    ("autograd::", _PYTHON),
    ("_LSH", _PYTHON),
    ("benchmark:", _PYTHON),
)
_GROUP_OF = {name: group for group, names in GROUPS.items() for name in names.split()}
HASHING_GROUP = "hashing"
REST_GROUP = "rest"
ALL_GROUPS = (*GROUPS, HASHING_GROUP, REST_GROUP)


def group_of(name: str, device: str) -> str:
    """Which group an operation's own time belongs to, by its name alone.

    Args:
        name: as the profiler gives it.
        device: "cpu" or "cuda". On CUDA the time is that of the kernels which the operation started.
    """
    # On the CPU the own time of a node of ours is Python; on CUDA, kernels that it starts past aten.
    if name.startswith("_LSH") and device == "cuda":
        return "attention kernels"
    for prefix, group in _PREFIXES:
        if name.startswith(prefix):
            return group
    if "::" not in name and name.rstrip("0123456789").endswith("Backward"):
        return _PYTHON
    bare = name.removeprefix("aten::")
    return _GROUP_OF.get(bare) or _GROUP_OF.get(bare.removesuffix("_")) or REST_GROUP


def group_times(events: Iterable[Any], device: str) -> tuple[dict[str, float], dict[str, float]]:
    """Adds up the own time of operations by group.

    Args:
        events: `torch.autograd.profiler_util.FunctionEvent`s.
        device: "cpu" or "cuda".

    Returns:
        Seconds by group, each group present, and seconds by name of what makes up "rest".
    """
    seconds = dict.fromkeys(ALL_GROUPS, 0.0)
    rest: defaultdict[str, float] = defaultdict(float)
    for event in events:
        # On CUDA the profiler also lists the kernels themselves; their time is already with the operation.
        if event.device_type != DeviceType.CPU:
            continue
        own = (event.self_device_time_total if device == "cuda" else event.self_cpu_time_total) * 1e-6
        group = HASHING_GROUP if _is_in_hashing(event) else group_of(event.name, device)
        seconds[group] += own
        if group == REST_GROUP and own:
            rest[event.name] += own
    return seconds, dict(sorted(rest.items(), key=lambda item: -item[1]))


def _is_in_hashing(event: Any) -> bool:
    while event is not None:
        if event.name == _HASHING:
            return True
        event = event.cpu_parent
    return False


def profile_ours(tokens: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Profiles one call of ours, after one that is not looked at.

    Args:
        tokens: T.
        dtype: of the inputs.
        device: "cpu" (own CPU time of operations) or "cuda" (time of the kernels they start).

    Returns:
        Seconds the profiled call took, own time by group in seconds and as a share, and the names in "rest".
    """
    hash_step, attend = ours_in_steps(make_inputs(tokens, dtype, device))
    attend(hash_step())
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with profile(activities=activities) as profiler:
        begin = time.perf_counter()
        with record_function(_CALL):
            with record_function(_HASHING):
                buckets = hash_step()
            attend(buckets)
            if device == "cuda":
                torch.cuda.synchronize()
        elapsed = time.perf_counter() - begin
    seconds, rest = group_times(profiler.events(), device)
    total = sum(seconds.values())
    return {
        "time_of": "operations on the CPU, own time"
        if device == "cpu"
        else "kernels, by the operation that starts them",
        "call_s": elapsed,
        "total_s": total,
        "groups": {name: {"seconds": value, "share": value / total} for name, value in seconds.items()},
        "rest": rest,
    }


def useful_operations(tokens: int) -> dict[str, int]:
    """Floating-point operations that our call cannot do without, a multiplication and an addition counting two.

    The attention: per head and round, T / W blocks of W queries against 2W keys; a matrix product of such a block is
    2 * W * 2W * D operations. Forward has two (logits, output), backward five (logits again, and the gradients of
    weights, values, queries and keys). Whole blocks count, though at most half of a block is within the window. The
    hashing: one product of the vectors with the rotations, D x n / 2 per factor n and round.

    Args:
        tokens: T.
    """
    blocks = -(-tokens // BUCKET_SIZE)
    product = 2 * BUCKET_SIZE * 2 * BUCKET_SIZE * HEAD_DIM
    attention = HEADS * HASHES * blocks * product * (2 + 5)
    hashing = HEADS * HASHES * tokens * 2 * HEAD_DIM * sum(factor // 2 for factor in bucket_factors(tokens))
    return {"attention": attention, "hashing": hashing}


def measure_ceiling(size: int, dtype: torch.dtype, device: str, repetitions: int = 5) -> dict[str, Any]:
    """The machine's matrix multiplication: the best of several products of two square matrices.

    Args:
        size: n of the n x n matrices; the product counts 2 n^3 operations.
        dtype: theirs.
        device: where.
        repetitions: how many are timed, after one that is not.
    """
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator).to(dtype).to(device) for _ in range(2))
    out = torch.mm(left, right)
    speeds = []
    for _ in range(repetitions):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        torch.mm(left, right, out=out)
        if device == "cuda":
            torch.cuda.synchronize()
        speeds.append(2 * size**3 / (time.perf_counter() - begin) / 1e9)
    return {"size": size, "gflops": [round(speed, 3) for speed in speeds], "best_gflops": round(max(speeds), 3)}
