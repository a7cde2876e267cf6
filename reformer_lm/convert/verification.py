"""Whether a converted model computes what the other package's model computes: both are run with the same rotations."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from reformer_lm.convert.reformer_pytorch_options import complete_options
from reformer_lm.errors import InputError
from reformer_lm.model import ReformerLMForCausalLM

TOLERANCE = 1e-3
_MOST_TOKENS = 4096
_MOST_TOKENS_OF_FULL_ATTENTION = 1024


@dataclass(frozen=True)
class Agreement:
    """What a comparison found.

    Attributes:
        largest_difference: of two logits.
        largest_logit: greatest absolute value among theirs.
        tokens: lengths of the sequences that both models read.
    """

    largest_difference: float
    largest_logit: float
    tokens: tuple[int, ...]


class RecordedRotations(TorchFunctionMode):
    """Keeps the four-dimensional tensors of normal random numbers that are drawn while it is on.

    Such tensors are what both other packages draw as rotations, and nothing else in evaluation mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs a function of torch and looks at what came out."""
        result = func(*args, **(kwargs or {}))
        if func is torch.randn and result.dim() == 4:
            self.drawn.append(result)
        return result


@contextlib.contextmanager
def given_rotations(model: ReformerLMForCausalLM, rotations: list[tuple[Tensor, ...]]) -> Iterator[None]:
    """Makes our LSH layers, in their order, hash with some rotations.

    Args:
        model: ours.
        rotations: of each layer that has LSH heads, one tensor [1 or H, D, R, n / 2] per factor of the buckets; or
            none at all, for a sequence that nobody hashed.
    """
    layers: Any = model.reformer.stack.layers
    hashing = [layer.attention for layer in layers if layer.attention.lsh_heads]
    assert len(rotations) in (0, len(hashing)), f"{len(rotations)} rotations for {len(hashing)} layers"
    changed = hashing[: len(rotations)]
    for attention, given in zip(changed, rotations, strict=True):
        attention.rotations = lambda num_buckets, *_, given=given: given
    try:
        yield
    finally:
        for attention in changed:
            del attention.rotations


def compare_with_reformer_pytorch(
    model: ReformerLMForCausalLM, state: Mapping[str, Tensor], options: Mapping[str, Any], seed: int = 0
) -> Agreement:
    """Runs our model and the ReformerLM that it was made from on random tokens, both in float64.

    Args:
        model: ours; left as it is but for the dtype.
        state: tensors of the ReformerLM, by its own names.
        options: of the ReformerLM.
        seed: of the tokens and rotations.

    Raises:
        InputError: reformer-pytorch is not installed, or does not take the tensors.
    """
    try:
        import reformer_pytorch.reformer_pytorch as package
    except ImportError:
        raise InputError("--verify runs the other model too: pip install reformer-pytorch") from None
    full = complete_options(options)
    by_hand = {
        "_attend_across_buckets": "lsh_attend_across_buckets",
        "_allow_duplicate_attention": "lsh_allow_duplicate_attention",
    }
    # One call per layer, so that a layer draws its rotations once.
    arguments = {name: value for name, value in full.items() if name not in by_hand.values()} | {"attn_chunks": 1}
    if isinstance(arguments["ff_activation"], str):
        name = arguments["ff_activation"]
        arguments["ff_activation"] = getattr(package, name, None) or getattr(nn, name)
    if arguments["axial_position_shape"] is not None:
        arguments["axial_position_shape"] = tuple(arguments["axial_position_shape"])
    peer = package.ReformerLM(**arguments)
    for module in peer.modules():
        if isinstance(module, package.LSHAttention):
            for attribute, name in by_hand.items():
                setattr(module, attribute, full[name])
    report = peer.load_state_dict(dict(state), strict=False)
    # What older versions did not save, the second names of the blocks and frequencies, needs no loading.
    lacking = [name for name in report.missing_keys if "irrev_blocks" not in name and not name.endswith("inv_freq")]
    if lacking or report.unexpected_keys:
        names = ", ".join([*lacking, *report.unexpected_keys][:4])
        raise InputError(
            f"the installed reformer-pytorch does not take these weights ({names}): another version wrote them"
        )
    lengths = lengths_for_reformer_pytorch(full)
    return _compare(model, peer.double().eval(), lambda x: peer(x), lambda drawn: (drawn,), lengths, seed)


def compare_with_transformers(model: ReformerLMForCausalLM, peer: Any, seed: int = 0) -> Agreement:
    """Runs our model and the ReformerModelWithLMHead that it was made from on random tokens, both in float64.

    Args:
        model: ours; left as it is but for the dtype.
        peer: theirs, likewise.
        seed: of the tokens and rotations.
    """
    config = peer.config
    kinds = set(config.attn_layers)
    chunks = [
        c
        for kind, c in (("lsh", config.lsh_attn_chunk_length), ("local", config.local_attn_chunk_length))
        if kind in kinds
    ]
    step, longest = math.lcm(*chunks), model.config.max_position_embeddings
    wanted = {min(chunks), 2 * step, max(2 * step, min(_MOST_TOKENS, longest) // step * step)}
    lengths = tuple(sorted(tokens for tokens in wanted if 0 < tokens <= longest))
    if peer.lm_head.decoder.bias is None:
        # See `from_transformers`: versions before 5 added it.
        peer.lm_head.decoder.bias = peer.lm_head.bias
    # What pieces they work off is a matter of memory, and of lengths that they refuse.
    peer.lm_head.chunk_size_lm_head = 0
    for layer in peer.reformer.encoder.layers:
        layer.feed_forward.chunk_size_feed_forward = 0
    factors = model.config.bucket_factors or ()
    if "lsh" in kinds and config.num_buckets is None:
        # As they count: the first one weighs least.
        for layer in peer.reformer.encoder.layers:
            layer.attention.self_attention.num_buckets = list(reversed(factors))

    def by_factor(drawn: Tensor) -> tuple[Tensor, ...]:
        return tuple(reversed(drawn.split([n // 2 for n in reversed(factors)], dim=-1)))

    return _compare(model, peer.double().eval(), lambda x: peer(x, use_cache=False).logits, by_factor, lengths, seed)


def _compare(
    model: ReformerLMForCausalLM,
    peer: nn.Module,
    run: Callable[[Tensor], Tensor],
    by_factor: Callable[[Tensor], tuple[Tensor, ...]],
    lengths: tuple[int, ...],
    seed: int,
) -> Agreement:
    if not lengths:
        raise InputError(
            "--verify: the other model cannot run at any length, its longest sequence is too short for its chunks"
        )
    dtype = model.dtype
    model.double().eval()
    difference = largest = 0.0
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for tokens in lengths:
            # One row: where each head has its own rotations they also differ between rows.
            x = torch.randint(0, model.config.vocab_size, (1, tokens))
            with RecordedRotations() as recorded:
                theirs = run(x)
            with given_rotations(model, [by_factor(drawn) for drawn in recorded.drawn]):
                ours = model(x).logits
            gap = float((ours - theirs).abs().max())
            difference = gap if math.isnan(gap) else max(difference, gap)
            largest = max(largest, float(theirs.abs().max()))
    model.to(dtype)
    return Agreement(difference, largest, lengths)


def lengths_for_reformer_pytorch(options: Mapping[str, Any]) -> tuple[int, ...]:
    """Short sequences and a long one that a ReformerLM can read, hashed and, where there is that, under full attention.

    Args:
        options: complete ones, of `complete_options`.

    Returns:
        Numbers of tokens, rising; none if it can read nothing at all.
    """
    step, longest, memory = 2 * options["bucket_size"], options["max_seq_len"], options["num_mem_kv"]
    local = options["n_local_attn_heads"] > 0
    if local and memory % step:
        # Both the sequence and what stands behind it would have to fill the chunks.
        return ()
    threshold = (1 << 40) if options["use_full_attn"] else options["full_attn_thres"]

    def readable(tokens: int) -> bool:
        chunked = tokens + memory > threshold
        return 0 < tokens <= longest and not (local and tokens % step) and not (chunked and (tokens + memory) % step)

    hashed_from = max(1, threshold - memory + 1)
    hashed = [tokens for tokens in range(hashed_from, min(longest, hashed_from + 4 * step) + 1) if readable(tokens)][:2]
    hashed += [tokens for tokens in range(min(longest, _MOST_TOKENS), hashed_from, -1) if readable(tokens)][:1]
    # Its cost grows with the square of the length.
    most_full = min(threshold - memory, longest, _MOST_TOKENS_OF_FULL_ATTENTION)
    full = [tokens for tokens in range(1, most_full + 1) if readable(tokens)]
    return tuple(sorted({*hashed, *full[:1], *full[-1:]}))
