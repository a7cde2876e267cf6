"""What the parity tests share: pairs of models with the same weights, and the peer's random rotations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reformer_lm import ReformerLMConfig, ReformerLMForCausalLM, ReformerLMForMaskedLM
from reformer_lm.convert.reformer_pytorch_names import our_name
from reformer_lm.convert.reformer_pytorch_options import config_of_options

# Small and odd: heads * dim_head differs from dim, and nothing divides what it need not divide.
PEER_DEFAULTS: dict[str, Any] = {
    "num_tokens": 19,
    "dim": 10,
    "depth": 3,
    "max_seq_len": 48,
    "heads": 3,
    "dim_head": 4,
    "bucket_size": 4,
    "n_hashes": 3,
    "ff_chunks": 5,
    "causal": True,
}

# Options of their Reformer that ReformerLM has no argument for -> the attribute of LSHAttention.
_SET_BY_HAND = {
    "lsh_attend_across_buckets": "_attend_across_buckets",
    "lsh_allow_duplicate_attention": "_allow_duplicate_attention",
}
# What stands around the names of parts of a model, there and here.
_PARTS = {
    "ReformerLM": ("", ""),
    "LSHSelfAttention": ("reformer.layers.blocks.0.f.net.fn.", "reformer.stack.layers.0.attention."),
    "FeedForward": ("reformer.layers.blocks.0.g.net.fn.fn.", "reformer.stack.layers.0.feed_forward."),
}


def translate_options(options: dict[str, Any]) -> ReformerLMConfig:
    """Our configuration of the model that ReformerLM(**options) is.

    Besides those of ReformerLM, ``options`` may hold the ones of _SET_BY_HAND.
    """
    config = config_of_options(options | {"causal": True})
    if options["causal"]:
        return config
    return ReformerLMConfig(**config.to_dict() | {"causal": False, "sort_padding": True})


def parameter_pairs(peer: nn.Module, ours: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Their parameter and ours, by our name; each parameter of either model stands in exactly one pair.

    ``peer`` is a ReformerLM, an LSHSelfAttention or a FeedForward, ``ours`` its counterpart.
    """
    theirs = dict(peer.named_parameters())
    mine = dict(ours.named_parameters())
    there, here = _PARTS[type(peer).__name__]
    names = {name: our_name(there + name) for name in theirs}
    assert all(name is not None and name.startswith(here) for name in names.values()), names
    pairs = {names[name].removeprefix(here): parameter for name, parameter in theirs.items()}
    assert pairs.keys() == mine.keys()
    # Their memory has a batch dimension of 1.
    assert all(parameter.shape in {p.shape, (1, *p.shape)} for p, parameter in ((mine[n], pairs[n]) for n in pairs))
    return {name: (pairs[name], mine[name]) for name in mine}


@torch.no_grad()
def copy_weights(peer: nn.Module, ours: nn.Module) -> None:
    """Makes our parameters equal to theirs."""
    for theirs, mine in parameter_pairs(peer, ours).values():
        mine.copy_(theirs.view_as(mine))


@pytest.fixture
def peer() -> ModuleType:
    """The module reformer_pytorch.reformer_pytorch."""
    pytest.importorskip("reformer_pytorch", reason="reformer-pytorch is not installed")
    import reformer_pytorch.reformer_pytorch

    return reformer_pytorch.reformer_pytorch


class RecordingTorch:
    """Stands in for ``torch`` in the peer's module and keeps the rotations it draws."""

    def __init__(self) -> None:
        self.rotations: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def randn(self, *shape: Any, **options: Any) -> Tensor:
        drawn = torch.randn(*shape, **options)
        if drawn.dim() == 4:
            self.rotations.append(drawn)
        return drawn

    def take(self) -> list[Tensor]:
        """The rotations drawn since the last call, each [1 or B * H, D, R, n / 2], in order."""
        taken, self.rotations = self.rotations, []
        return taken


@pytest.fixture
def recorder(peer: ModuleType) -> Iterator[RecordingTorch]:
    """Records the rotations that the peer draws."""
    recording = RecordingTorch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer, "torch", recording)
        yield recording


@pytest.fixture
def double_by_default() -> Iterator[None]:
    """Numbers of no stated type are float64: the peer counts duplicates in the default type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def set_rotations(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module, Tensor], None]:
    """Gives one of our LSHSelfAttention modules the peer's rotations."""

    def give(attention: nn.Module, rotations: Tensor) -> None:
        def use(num_buckets: int, *_: object) -> tuple[Tensor, ...]:
            assert num_buckets == 2 * rotations.shape[-1]
            return (rotations,)

        monkeypatch.setattr(attention, "rotations", use, raising=True)

    return give


@pytest.fixture
def make_pair(peer: ModuleType) -> Callable[..., tuple[nn.Module, ReformerLMForCausalLM | ReformerLMForMaskedLM]]:
    """A ReformerLM and our model with the same weights, both in float64 and in training mode.

    Called with options of ReformerLM or of _SET_BY_HAND, which change PEER_DEFAULTS.
    """

    def make(**options: Any) -> tuple[nn.Module, ReformerLMForCausalLM | ReformerLMForMaskedLM]:
        options = PEER_DEFAULTS | options
        torch.manual_seed(0)
        arguments = {name: value for name, value in options.items() if name not in _SET_BY_HAND}
        theirs = peer.ReformerLM(**arguments).double()
        with torch.no_grad():
            # Nothing may stay 0 or 1, as ReZero's factors do at first: an unused or misplaced weight would not show.
            for parameter in theirs.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        for module in theirs.modules():
            if isinstance(module, peer.LSHAttention):
                for name in _SET_BY_HAND.keys() & options.keys():
                    assert hasattr(module, _SET_BY_HAND[name])
                    setattr(module, _SET_BY_HAND[name], options[name])
            if isinstance(module, peer.FixedPositionalEmbedding):
                # They round the frequencies to float32, which would hide errors below 1e-6.
                exponent = torch.arange(0, 2 * len(module.inv_freq), 2, dtype=torch.float64)
                module.inv_freq = 10_000.0 ** -(exponent / (2 * len(module.inv_freq)))
        model = ReformerLMForCausalLM if options["causal"] else ReformerLMForMaskedLM
        ours = model(translate_options(options)).double().train()
        copy_weights(theirs, ours)
        return theirs, ours

    return make


@pytest.fixture
def peer_tools() -> SimpleNamespace:
    """What the fixtures here are made of, for models of several parts."""
    return SimpleNamespace(
        defaults=PEER_DEFAULTS,
        translate_options=translate_options,
        parameter_pairs=parameter_pairs,
        copy_weights=copy_weights,
    )


@pytest.fixture
def copy() -> Callable[[nn.Module, nn.Module], None]:
    """`copy_weights`."""
    return copy_weights


@pytest.fixture
def assert_same_module() -> Callable[..., None]:
    """Checks outputs, and gradients of every parameter, of two modules whose weights are the same.

    Called with their module and ours, their output and ours, the tolerance, and optionally an input whose gradient
    is to be the same too and a mask bool [B, T] of the outputs that count.
    """

    def check(
        modules: tuple[nn.Module, nn.Module],
        outputs: tuple[Tensor, Tensor],
        tolerance: dict[str, float],
        x: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> None:
        expected, actual = outputs
        weights = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(1))
        if counts is not None:
            expected, actual, weights = (torch.where(counts.unsqueeze(-1), t, 0.0) for t in (*outputs, weights))
        torch.testing.assert_close(actual, expected, **tolerance)
        pairs = parameter_pairs(*modules)
        inputs = [] if x is None else [x]
        for tensor in (*inputs, *(p for pair in pairs.values() for p in pair)):
            tensor.grad = None
        # Their reversible layers know backward() only, not autograd.grad().
        (expected * weights).sum().backward()
        wanted = [t.grad for t in (*inputs, *(theirs for theirs, _ in pairs.values()))]
        for tensor in inputs:
            tensor.grad = None
        (actual * weights).sum().backward()
        found = [t.grad for t in (*inputs, *(mine for _, mine in pairs.values()))]
        names = [*(["the input"] if inputs else []), *pairs]
        for name, one, other in zip(names, found, wanted, strict=True):
            # None means 0: a lone token reads itself, whatever its query.
            one, other = (torch.zeros(()) if gradient is None else gradient for gradient in (one, other))
            one, other = torch.broadcast_tensors(one.double(), other.double())
            torch.testing.assert_close(one, other, **tolerance, msg=lambda text, name=name: f"{name}: {text}")

    return check
