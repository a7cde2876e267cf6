"""TrainingWrapper against reformer-pytorch's: signatures, losses, samples, filters."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from reformer_lm import TrainingWrapper
from reformer_lm.wrapper import top_k, top_p

TIGHT = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture
def tools(peer: ModuleType) -> ModuleType:
    """The module reformer_pytorch.generative_tools."""
    import reformer_pytorch.generative_tools

    return reformer_pytorch.generative_tools


def random_tokens(batch: int, tokens: int) -> Tensor:
    # Without 0, which fills up uneven rows.
    return torch.randint(1, 19, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize("method", ["__init__", "forward", "generate"])
def test_signatures(tools: ModuleType, method: str) -> None:
    theirs, ours = (
        inspect.signature(getattr(kind, method)).parameters.values()
        for kind in (tools.TrainingWrapper, TrainingWrapper)
    )
    assert [(p.name, p.kind) for p in ours] == [(p.name, p.kind) for p in theirs]
    # Their default filter is their top_k, ours is ours.
    functions = {tools.top_k: "top_k", top_k: "top_k"}
    assert [functions.get(p.default, p.default) for p in ours] == [functions.get(p.default, p.default) for p in theirs]


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("tokens", [8, 24, 48])
def test_loss(
    tools: ModuleType,
    make_pair: Any,
    recorder: Any,
    set_rotations: Any,
    assert_same_module: Any,
    tokens: int,
    as_list: bool,
) -> None:
    # One token more than the model sees: what it is trained on is x[:, :-1], up to max_seq_len (here 48) tokens.
    theirs, ours = make_pair(axial_position_emb=True, n_local_attn_heads=1)
    x: Any = random_tokens(2, tokens + 1)
    if as_list:
        x = list(x)
    expected = tools.TrainingWrapper(theirs)(x, return_loss=True)
    for layer, rotations in zip(ours.reformer.stack.layers, recorder.take(), strict=True):
        set_rotations(layer.attention, rotations)
    assert_same_module((theirs, ours), (expected, TrainingWrapper(ours)(x, return_loss=True)), TIGHT)


@pytest.mark.parametrize("tokens", [2, 7, 34, 49])
def test_loss_at_odd_lengths_under_full_attention(
    tools: ModuleType, make_pair: Any, assert_same_module: Any, tokens: int
) -> None:
    theirs, ours = make_pair(use_full_attn=True)
    x = random_tokens(3, tokens)
    losses = (wrapper(x, return_loss=True) for wrapper in (tools.TrainingWrapper(theirs), TrainingWrapper(ours)))
    assert_same_module((theirs, ours), tuple(losses), TIGHT)


def test_ignore_index(tools: ModuleType, make_pair: Any, assert_same_module: Any) -> None:
    theirs, ours = make_pair(use_full_attn=True)
    x = random_tokens(3, 20)
    assert (x[:, 1:] == 7).any()
    losses = (
        wrapper(x, return_loss=True)
        for wrapper in (tools.TrainingWrapper(theirs, ignore_index=7), TrainingWrapper(ours, ignore_index=7))
    )
    assert_same_module((theirs, ours), tuple(losses), TIGHT)


def test_logits(tools: ModuleType, make_pair: Any, assert_same_module: Any) -> None:
    theirs, ours = make_pair(use_full_attn=True)
    x = random_tokens(3, 20)
    outputs = tools.TrainingWrapper(theirs)(x), TrainingWrapper(ours)(x)
    assert_same_module((theirs, ours), outputs, TIGHT)


def uneven_rows() -> list[Tensor]:
    return [random_tokens(1, tokens)[0] for tokens in (17, 9, 2)]


def test_uneven_rows_score_real_tokens_only(tools: ModuleType, make_pair: Any) -> None:
    theirs, ours = make_pair(use_full_attn=True)
    rows = uneven_rows()
    with torch.no_grad():
        sums = [cross_entropy(theirs(row[None, :-1])[0], row[1:], reduction="sum") for row in rows]
        of_real_tokens = sum(sums) / (16 + 8 + 1)
        torch.testing.assert_close(TrainingWrapper(ours)(rows, return_loss=True), of_real_tokens, **TIGHT)
        # Theirs also scores the prediction of 8 + 15 tokens of padding.
        inputs, targets = (
            torch.nn.utils.rnn.pad_sequence(list(part), batch_first=True)
            for part in zip(*((row[:-1], row[1:]) for row in rows), strict=True)
        )
        of_everything = cross_entropy(theirs(inputs).transpose(1, 2), targets)
        their_loss = tools.TrainingWrapper(theirs)(rows, return_loss=True)
        torch.testing.assert_close(their_loss, of_everything, **TIGHT)
        assert abs(their_loss - of_real_tokens) > 1e-3


def test_uneven_rows_where_they_ignore_the_padding_too(
    tools: ModuleType, make_pair: Any, assert_same_module: Any
) -> None:
    theirs, ours = make_pair(use_full_attn=True)
    losses = (
        wrapper(uneven_rows(), return_loss=True)
        for wrapper in (tools.TrainingWrapper(theirs, ignore_index=0), TrainingWrapper(ours))
    )
    assert_same_module((theirs, ours), tuple(losses), TIGHT)


def samples(wrapper: Any, *arguments: Any, **options: Any) -> Tensor:
    torch.manual_seed(3)
    return wrapper.generate(*arguments, **options)


@pytest.mark.parametrize("name", ["top_k", "top_p"])
def test_samples_of_one_seed(tools: ModuleType, make_pair: Any, name: str) -> None:
    # Without LSH attention neither model draws anything but samples. Sixty tokens: past the longest sequence, too.
    theirs, ours = make_pair(use_full_attn=True)
    for prompt in (random_tokens(3, 5), random_tokens(1, 4)[0]):
        expected, actual = (
            samples(wrapper, prompt, 60, temperature=0.8, filter_logits_fn=function, filter_thres=0.6)
            for wrapper, function in (
                (tools.TrainingWrapper(theirs), getattr(tools, name)),
                (TrainingWrapper(ours), {"top_k": top_k, "top_p": top_p}[name]),
            )
        )
        assert actual.shape == (*prompt.shape[:-1], 60)
        assert torch.equal(actual, expected)
    assert actual.unique().numel() > 3
    assert ours.training


def test_the_end_token_stops_generation(tools: ModuleType, make_pair: Any) -> None:
    theirs, ours = make_pair(use_full_attn=True)
    wrappers = tools.TrainingWrapper(theirs), TrainingWrapper(ours)
    prompt = random_tokens(1, 5)[0]
    end = int(samples(wrappers[0], prompt, 12, filter_thres=0.3)[-1])
    expected, actual = (samples(wrapper, prompt, 30, eos_token=end, filter_thres=0.3) for wrapper in wrappers)
    assert expected[-1] == end
    assert torch.equal(actual, expected)


def test_an_ended_row_stays_ended(tools: ModuleType, make_pair: Any) -> None:
    theirs, ours = make_pair(use_full_attn=True)
    prompt = random_tokens(4, 5)
    end = 7
    expected = samples(tools.TrainingWrapper(theirs), prompt, 40, eos_token=end, filter_thres=0.1)
    actual = samples(TrainingWrapper(ours), prompt, 40, eos_token=end, filter_thres=0.1)
    went_on = False
    for mine, other in zip(actual.tolist(), expected.tolist(), strict=True):
        stop = mine.index(end) + 1 if end in mine else len(mine)
        assert mine[:stop] == other[:stop]
        assert set(mine[stop:]) <= {end}
        # Theirs stops only when all rows draw the end token in one and the same step.
        went_on = went_on or other[: len(mine)] != mine
    assert went_on


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3),
    vocabulary=st.integers(1, 60),
    thres=st.floats(0.05, 0.99),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    seed=st.integers(0, 2**31),
)
def test_filters(tools: ModuleType, batch: int, vocabulary: int, thres: float, scale: float, seed: int) -> None:
    logits = scale * torch.randn(batch, vocabulary, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(top_p(logits, thres=thres), tools.top_p(logits, thres=thres))
    expected = tools.top_k(logits, thres=thres)
    if int((1 - thres) * vocabulary) == 0:
        # They keep nothing at all, and the softmax is NaN; ours keeps the best token.
        assert (expected == -torch.inf).all()
        expected = torch.full_like(logits, -torch.inf).scatter(
            1, logits.argmax(1, keepdim=True), logits.amax(1, keepdim=True)
        )
    assert torch.equal(top_k(logits, thres=thres), expected)


def test_default_threshold_of_the_filters(tools: ModuleType) -> None:
    logits = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(top_k(logits), tools.top_k(logits))
    assert torch.equal(top_p(logits), tools.top_p(logits))
