"""ReformerEncDec of reformer-pytorch against ours: losses, logits, gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reformer_lm import ReformerEncDecConfig, ReformerLMForConditionalGeneration

TIGHT = {"rtol": 1e-9, "atol": 1e-9}
Pair = tuple[nn.Module, ReformerLMForConditionalGeneration]


class EncoderHolder(nn.Module):
    """Gives the encoder's parameters the names that they have below a head."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.reformer = encoder


@pytest.fixture
def make(peer: ModuleType, peer_tools: SimpleNamespace) -> Callable[..., Pair]:
    """A ReformerEncDec and ours with the same weights; options as theirs, with enc_ and dec_ in front."""
    from reformer_pytorch import ReformerEncDec

    defaults, dim = dict(peer_tools.defaults), peer_tools.defaults["dim"]
    del defaults["dim"], defaults["causal"]

    def of(**options: Any) -> Pair:
        arguments = {f"{part}_{name}": value for part in ("enc", "dec") for name, value in defaults.items()} | options
        torch.manual_seed(0)
        theirs = ReformerEncDec(dim, **arguments).double()
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        parts = {}
        for part in ("enc", "dec"):
            own = {name.removeprefix(f"{part}_"): x for name, x in arguments.items() if name.startswith(f"{part}_")}
            parts[part] = peer_tools.translate_options(own | {"dim": dim, "causal": part == "dec"})
        ours = ReformerLMForConditionalGeneration(ReformerEncDecConfig(parts["enc"], parts["dec"])).double().train()
        for one, other in halves(theirs, ours):
            peer_tools.copy_weights(one, other)
        return theirs, ours

    return of


def halves(theirs: nn.Module, ours: ReformerLMForConditionalGeneration) -> Iterator[tuple[nn.Module, nn.Module]]:
    yield theirs.enc.net.net, EncoderHolder(ours.encoder)
    yield theirs.dec.net.net, ours.decoder


def give_rotations(ours: ReformerLMForConditionalGeneration, rotations: list[Tensor], set_rotations: Any) -> None:
    layers = [*ours.encoder.stack.layers, *ours.decoder.reformer.stack.layers]
    assert len(rotations) in (0, len(layers))
    for layer, rotation in zip(layers, rotations, strict=False):
        set_rotations(layer.attention, rotation)


def assert_same_gradients(pair: Pair, peer_tools: SimpleNamespace) -> None:
    for one, other in halves(*pair):
        for name, (expected, actual) in peer_tools.parameter_pairs(one, other).items():
            assert expected.grad is not None and actual.grad is not None, name
            torch.testing.assert_close(
                actual.grad, expected.grad.view_as(actual), **TIGHT, msg=lambda text, name=name: f"{name}: {text}"
            )


def tokens_like(batch: int, tokens: int) -> Tensor:
    # Without 0, which they ignore in the loss.
    return torch.randint(1, 19, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


VARIANTS: dict[str, dict[str, Any]] = {
    "as they come": {"dec_bucket_size": 8},
    "axial": {"enc_axial_position_emb": True, "dec_axial_position_emb": True, "enc_depth": 1},
    "memory and local heads": {"dec_num_mem_kv": 8, "dec_n_local_attn_heads": 1, "enc_n_local_attn_heads": 1},
    "full attention": {"enc_use_full_attn": True, "dec_use_full_attn": True},
}


@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_loss_and_gradients(
    make: Any,
    peer_tools: SimpleNamespace,
    recorder: Any,
    set_rotations: Any,
    options: dict[str, Any],
    reversible: bool,
) -> None:
    # Their reversible decoder cannot send gradients through its keys more than once, so theirs is plain; ours is both.
    theirs, ours = make(dec_reverse_thres=1000, enc_reverse_thres=1000, **options)
    for stack in (ours.encoder.stack, ours.decoder.reformer.stack):
        stack.reversible_threshold = 0 if reversible else 1000
    # Lengths of which they need not fill up any.
    source, target = tokens_like(2, 32), tokens_like(2, 17)
    expected = theirs(source, target, return_loss=True)
    give_rotations(ours, recorder.take(), set_rotations)
    actual = ours(source, decoder_input_ids=target[:, :-1], labels=target[:, 1:])
    torch.testing.assert_close(actual.loss, expected, **TIGHT)
    expected.backward()
    actual.loss.backward()
    assert_same_gradients((theirs, ours), peer_tools)


def test_padded_sources_under_full_attention(make: Any, peer_tools: SimpleNamespace) -> None:
    theirs, ours = make(enc_use_full_attn=True, dec_use_full_attn=True, enc_reverse_thres=1000, dec_reverse_thres=1000)
    source, target = tokens_like(3, 24), tokens_like(3, 12)
    mask = torch.arange(24) < torch.tensor([[24], [13], [3]])
    # Their source mask does not reach the decoder of itself, in training.
    expected = theirs(source, target, enc_input_mask=mask, dec_context_mask=mask)
    actual = ours(source, attention_mask=mask, decoder_input_ids=target).logits
    torch.testing.assert_close(actual, expected, **TIGHT)
    weights = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected).sin()
    (expected * weights).sum().backward()
    (actual * weights).sum().backward()
    assert_same_gradients((theirs, ours), peer_tools)


def test_greedy_generation(make: Any) -> None:
    theirs, ours = make(enc_use_full_attn=True, dec_use_full_attn=True)
    source, start = tokens_like(2, 24), torch.tensor([[3], [3]])
    ours.eval()
    expected = theirs.eval().generate(source, start, 12, filter_logits_fn=lambda logits, thres: best_only(logits))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "decoder_start_token_id": 3}
    assert torch.equal(ours.generate(source, **options)[:, 1:], expected)


def best_only(logits: Tensor) -> Tensor:
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True), -torch.inf)
