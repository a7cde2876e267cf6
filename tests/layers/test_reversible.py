"""The reversible stack against plain autograd."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn

from reformer_lm import ReformerLMConfig
from reformer_lm.layers.reversible import ReversibleStack
from reformer_lm.layers.sequence import SequenceInfo
from reformer_lm.ops import lsh
from reformer_lm.ops.lsh_slice import Slice

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
    {"ff_chunk_size": 7, "hidden_dropout_prob": 0.2, "activation_dropout": 0.1, "attention_dropout": 0.2},
    {"num_mem_kv": 2, "allow_duplicate_attention": False},
    {"attn_chunks": 4},
    # Groups of one head and of two, local and LSH heads together.
    {"attn_chunks": 3, "num_local_heads": 1, "num_shifted_heads": 1, "num_mem_kv": 2, "full_attention_threshold": 10},
    {"attn_chunks": 2, "hidden_dropout_prob": 0.2, "attention_dropout": 0.2},
    {"attn_chunks": 2, "lsh_mask": "chunked", "attention_dropout": 0.2, "local_keys": "shared"},
    {"num_local_heads": 0, "num_shifted_heads": 1},
    {"num_local_heads": 4},
    {"full_attention_threshold": 10},
    {"hidden_dropout_prob": 0.2},
    {"attention_dropout": 0.2, "activation_dropout": 0.1},
    {"attention_dropout": 0.2, "num_local_heads": 0, "lsh_mask": "chunked"},
    {"layer_dropout": 0.5, "num_hidden_layers": 6},
    {"position_type": "rotary"},
    {"share_layer_weights": True, "one_value_head": True, "num_mem_kv": 2},
    {"product_key_layers": [1], "product_keys": 36, "ff_chunk_size": 7, "hidden_dropout_prob": 0.2},
    {"share_layer_weights": True, "norm_type": "rezero", "lsh_mask": "chunked", "attn_chunks": 2},
    {"share_layer_weights": True, "hidden_dropout_prob": 0.2, "ff_chunk_size": 7, "layer_dropout": 0.5},
    {"num_buckets": [2, 4], "attention_output_bias": False, "attn_chunks": 3, "one_value_head": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("tokens", [1, 23])
@pytest.mark.parametrize("reversible", ["full", "keep_attention"])
def test_gradients_equal_plain_autograd(reversible: str, options: dict[str, object], tokens: int) -> None:
    stack = make_stack(reversible=reversible, **options)
    x = torch.randn(2, tokens, 16, dtype=torch.float64)
    outputs, gradients = run(stack, 0, x)
    expected_outputs, expected = run(stack, ALWAYS_PLAIN, x)
    for one, other in zip(outputs, expected_outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert gradients.shape == expected.shape
    torch.testing.assert_close(gradients, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("reversible", ["full", "keep_attention"])
def test_float32_errors_do_not_add_up_over_twelve_layers(reversible: str) -> None:
    x = torch.randn(1, 60, 16)
    stack = make_stack(num_hidden_layers=12, reversible=reversible).float()
    for parameter in stack.parameters():
        # As at the beginning of training; with weights of 0.3 the streams would grow a thousandfold.
        nn.init.normal_(parameter, std=0.1)
    _, gradients = run(stack, 0, x)
    _, expected = run(stack, ALWAYS_PLAIN, x)
    assert (gradients - expected).norm() / expected.norm() < 1e-5


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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [{}, {"reversible": "keep_attention", "attn_chunks": 2, "ff_chunk_size": 5}], ids=str
)
def test_autocast_state_is_replayed(options: dict[str, object], dtype: torch.dtype, inside: bool) -> None:
    stack = make_stack(**options).float()
    x = torch.randn(1, 23, 16)
    info = SequenceInfo(torch.arange(23).unsqueeze(0))
    gradients = []
    for threshold in (0, ALWAYS_PLAIN):
        stack.reversible_threshold = threshold
        stack.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            y1, y2 = stack(x, x, info)
            assert y1.dtype == torch.float32
            loss = y1.sum() + y2.sin().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        assert all(p.grad is not None for p in stack.parameters())
        gradients.append(torch.cat([p.grad.flatten() for p in stack.parameters()]))
    # Rebuilt inputs differ in their last float32 bits, which half precision may round the other way.
    assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() < 0.02


def kept_sizes(stack: ReversibleStack, tokens: int) -> list[int]:
    """Numbers of elements of all tensors that the graph of a forward pass keeps."""
    sizes: list[int] = []
    x = torch.randn(1, tokens, 16, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        stack(x, x, SequenceInfo(torch.arange(tokens).unsqueeze(0)))
    return sizes


@pytest.mark.parametrize("reversible", ["full", "keep_attention"])
def test_only_the_last_pair_is_kept(reversible: str) -> None:
    """The number of tensors that the graph keeps does not grow with depth."""
    kept = {depth: kept_sizes(make_stack(num_hidden_layers=depth, reversible=reversible), 40) for depth in (2, 6)}
    assert kept[2] == kept[6] == [640, 640]


def test_off_keeps_every_activation() -> None:
    assert len(kept_sizes(make_stack(reversible="off"), 40)) > 3 * 20


def test_kept_attention_does_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward = Slice.forward
    monkeypatch.setattr(Slice, "forward", lambda self: calls.append(1) or forward(self))
    monkeypatch.setattr(lsh, "MAX_TOKENS", 0)  # else so few tokens would not be sorted
    x = torch.randn(1, 23, 16, dtype=torch.float64)
    for reversible, times in (("full", 2), ("keep_attention", 1), ("off", 1)):
        stack = make_stack(reversible=reversible)
        run(stack, 0, x)
        assert len(calls) == times * len(stack.layers), reversible
        calls.clear()


@pytest.mark.parametrize("options", [{}, {"num_local_heads": 1, "num_mem_kv": 2}, {"lsh_mask": "chunked"}], ids=str)
def test_groups_of_heads_make_no_difference(options: dict[str, object]) -> None:
    x = torch.randn(2, 23, 16, dtype=torch.float64)
    expected_outputs, expected = run(make_stack(**options), 0, x)
    for chunks in (2, 3, 4, 9):
        outputs, gradients = run(make_stack(attn_chunks=chunks, **options), 0, x)
        for one, other in zip(outputs, expected_outputs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reversible", ["full", "keep_attention", "off"])
def test_groups_of_heads_attend_as_often_as_all_heads_together(
    reversible: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = []
    forward = Slice.forward
    monkeypatch.setattr(Slice, "forward", lambda self: heads.append(self.q.shape[0]) or forward(self))
    monkeypatch.setattr(lsh, "MAX_TOKENS", 0)
    stack = make_stack(reversible=reversible, attn_chunks=4)
    run(stack, 0, torch.randn(1, 23, 16, dtype=torch.float64))
    times = {"full": 2, "keep_attention": 1, "off": 1}[reversible]
    assert heads == [1] * (2 * times * len(stack.layers))


@pytest.mark.parametrize("reversible", ["full", "off"])
def test_inner_activations_of_one_piece_at_a_time(reversible: str) -> None:
    """The 64 numbers per token inside the feed-forward block are alive for no more than one piece of tokens."""
    stack = make_stack(reversible=reversible, ff_chunk_size=5)
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def watch(module: nn.Module, arguments: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal most
        assert out.shape[1:] <= (5, 64)
        alive.append(weakref.ref(out.untyped_storage()))
        most = max(most, sum(storage() is not None for storage in alive))

    for layer in stack.layers:
        layer.feed_forward.inner.register_forward_hook(watch)
    run(stack, 0, torch.randn(1, 23, 16, dtype=torch.float64))
    # Five pieces a layer, forward and backward.
    assert len(alive) == 2 * 5 * len(stack.layers)
    # The last one's variable lives until the next is there.
    assert 1 <= most <= 2


def test_a_second_backward_pass_over_the_same_graph() -> None:
    stack = make_stack()
    x = torch.randn(1, 23, 16, dtype=torch.float64)
    y1, y2 = stack(x, 2 * x, SequenceInfo(torch.arange(23).unsqueeze(0)))
    loss = y1.sin().sum() + (y2 * y2).sum()
    first, second = (torch.autograd.grad(loss, list(stack.parameters()), retain_graph=True) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_backward_passes_of_two_forward_passes_do_not_mix() -> None:
    stack = make_stack()
    info = SequenceInfo(torch.arange(9).unsqueeze(0))
    pieces = torch.randn(2, 1, 9, 16, dtype=torch.float64)
    losses = [sum(y.sin().sum() for y in stack(x, x, info)) for x in pieces]
    together = [torch.autograd.grad(loss, list(stack.parameters())) for loss in reversed(losses)][::-1]
    for x, gradients in zip(pieces, together, strict=True):
        alone = torch.autograd.grad(sum(y.sin().sum() for y in stack(x, x, info)), list(stack.parameters()))
        for one, other in zip(gradients, alone, strict=True):
            assert torch.equal(one, other)


def test_early_layers_frozen_stop_the_backward_pass_there() -> None:
    stack = make_stack()
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    run(stack, 0, x)
    expected = [p.grad.clone() for p in stack.layers[2].parameters()]
    stack.zero_grad()
    stack.layers[:2].requires_grad_(False)
    y1, y2 = stack(x, 2 * x, SequenceInfo(torch.arange(9).unsqueeze(0)))
    (y1.sin().sum() + (y2 * y2).sum()).backward()
    for parameter, other in zip(stack.layers[2].parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, other, rtol=1e-10, atol=1e-10)
    assert all(p.grad is None for p in stack.layers[:2].parameters())
