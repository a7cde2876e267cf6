"""The reversible stack against plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from reformer_lm import ReformerLMConfig
from reformer_lm.layers.attention import SequenceInfo
from reformer_lm.layers.reversible import ReversibleStack

ALWAYS_PLAIN = 1_000_000


def make_stack(**options: object) -> ReversibleStack:
    torch.manual_seed(0)
    config = ReformerLMConfig(
        vocab_size=11,
        hidden_size=16,
        num_hidden_layers=options.pop("num_hidden_layers", 3),
        num_attention_heads=4,
        max_position_embeddings=64,
        bucket_size=4,
        **options,
    )
    stack = ReversibleStack(config).double()
    for parameter in stack.parameters():
        nn.init.normal_(parameter, std=0.3)
    return stack


def run(stack: ReversibleStack, threshold: int, x: Tensor, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Outputs, and gradients of the inputs and parameters as one vector."""
    stack.reversible_threshold = threshold
    stack.zero_grad()
    x1, x2 = x.clone().requires_grad_(), (2 * x).requires_grad_()
    info = SequenceInfo(torch.arange(x.shape[1]).unsqueeze(0))
    torch.manual_seed(seed)
    y1, y2 = stack(x1, x2, info)
    (y1.sin().sum() + (y2 * y2).sum()).backward()
    gradients = [x1.grad, x2.grad, *(p.grad for p in stack.parameters() if p.grad is not None)]
    return [y1, y2], torch.cat([gradient.flatten() for gradient in gradients])


OPTIONS = [
    {},
    {"lsh_mask": "chunked"},
    {"norm_type": "scalenorm", "ff_activation": "swiglu", "ff_chunk_size": 7},
    {"norm_type": "rezero"},
    {"num_local_heads": 0, "num_shifted_heads": 1},
    {"num_local_heads": 4},
    {"full_attention_threshold": 10},
    {"hidden_dropout_prob": 0.2},
    {"attention_dropout": 0.2, "activation_dropout": 0.1},
    {"attention_dropout": 0.2, "num_local_heads": 0, "lsh_mask": "chunked"},
    {"layer_dropout": 0.5, "num_hidden_layers": 6},
    {"position_type": "rotary"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("tokens", [1, 23])
def test_gradients_equal_plain_autograd(options: dict[str, object], tokens: int) -> None:
    stack = make_stack(**options)
    x = torch.randn(2, tokens, 16, dtype=torch.float64)
    outputs, gradients = run(stack, 0, x)
    expected_outputs, expected = run(stack, ALWAYS_PLAIN, x)
    for one, other in zip(outputs, expected_outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert gradients.shape == expected.shape
    torch.testing.assert_close(gradients, expected, rtol=1e-8, atol=1e-8)


def test_dropout_is_on_in_training_and_off_in_evaluation() -> None:
    stack = make_stack(hidden_dropout_prob=0.3)
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    assert not torch.equal(run(stack, 0, x, seed=1)[1], run(stack, 0, x, seed=2)[1])
    stack.eval()
    assert torch.equal(run(stack, 0, x, seed=1)[1], run(stack, 0, x, seed=2)[1])


def test_backward_leaves_the_random_state_alone() -> None:
    stack = make_stack(hidden_dropout_prob=0.3)
    info = SequenceInfo(torch.arange(9).unsqueeze(0))
    x = torch.randn(1, 9, 16, dtype=torch.float64, requires_grad=True)
    y1, y2 = stack(x, x, info)
    before = torch.get_rng_state()
    (y1 + y2).sum().backward()
    assert torch.equal(before, torch.get_rng_state())


def test_frozen_parameters_get_no_gradient_and_change_no_other() -> None:
    stack = make_stack()
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    run(stack, 0, x)
    expected = {name: p.grad.clone() for name, p in stack.named_parameters()}
    for name, parameter in stack.named_parameters():
        parameter.requires_grad_("layers.1." not in name)
        parameter.grad = None
    run(stack, 0, x)
    for name, parameter in stack.named_parameters():
        if "layers.1." in name:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-10, atol=1e-10)


def test_inputs_without_gradient() -> None:
    stack = make_stack()
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    run(stack, 0, x)
    expected = [p.grad.clone() for p in stack.parameters()]
    stack.zero_grad()
    y1, y2 = stack(x, 2 * x, SequenceInfo(torch.arange(9).unsqueeze(0)))
    (y1.sin().sum() + (y2 * y2).sum()).backward()
    for parameter, other in zip(stack.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, other, rtol=1e-10, atol=1e-10)


def test_gradient_accumulates_over_backward_passes() -> None:
    stack = make_stack()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    info = SequenceInfo(torch.arange(9).unsqueeze(0))
    for piece in x.split(1):
        sum(y.sum() for y in stack(piece, piece, info)).backward()
    accumulated = [p.grad.clone() for p in stack.parameters()]
    stack.zero_grad()
    sum(y.sum() for y in stack(x, x, info)).backward()
    for parameter, other in zip(stack.parameters(), accumulated, strict=True):
        torch.testing.assert_close(parameter.grad, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_autocast_state_is_replayed(inside: bool) -> None:
    stack = make_stack().float()
    x = torch.randn(1, 23, 16)
    info = SequenceInfo(torch.arange(23).unsqueeze(0))
    gradients = []
    for threshold in (0, ALWAYS_PLAIN):
        stack.reversible_threshold = threshold
        stack.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y1, y2 = stack(x, x, info)
            assert y1.dtype == torch.float32
            loss = y1.sum() + y2.sin().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        assert all(p.grad is not None for p in stack.parameters())
        gradients.append(torch.cat([p.grad.flatten() for p in stack.parameters()]))
    # Rebuilt inputs differ in their last float32 bits, which bf16 may round the other way.
    assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() < 0.02


def test_only_the_last_pair_is_kept() -> None:
    """The number of tensors that the graph keeps does not grow with depth."""
    kept = {}
    for depth in (2, 6):
        stack = make_stack(num_hidden_layers=depth)
        sizes: list[int] = []
        x = torch.randn(1, 40, 16, dtype=torch.float64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            stack(x, x, SequenceInfo(torch.arange(40).unsqueeze(0)))
        kept[depth] = sizes
    assert kept[2] == kept[6] == [640, 640]
