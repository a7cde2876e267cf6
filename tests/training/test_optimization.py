import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reformer_lm import ReformerLMConfig, ReformerLMForCausalLM
from reformer_lm.training.optimization import (
    LearningRateSchedule,
    build_optimizer,
    default_warmup,
    set_learning_rate,
    split_by_decay,
)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_schedule_rises_to_the_peak_and_falls_to_the_floor(kind: str) -> None:
    schedule = LearningRateSchedule(peak=2.0, total_steps=101, warmup_steps=20, kind=kind, floor_ratio=0.1)
    rates = [schedule.rate(step) for step in range(101)]
    assert rates[:21] == pytest.approx([2.0 * (step + 1) / 21 for step in range(21)])
    assert all(a > b for a, b in zip(rates[20:], rates[21:], strict=False))
    assert rates[100] == pytest.approx(0.2)
    # Half-way down, both are in the middle.
    assert rates[60] == pytest.approx(1.1)
    quarter = {"cosine": 0.2 + 1.8 * (0.5 + 0.5 * math.cos(math.pi / 4)), "linear": 0.2 + 1.8 * 0.75}
    assert rates[40] == pytest.approx(quarter[kind])


def test_constant_schedule_stays_at_the_peak() -> None:
    schedule = LearningRateSchedule(peak=2.0, total_steps=10, warmup_steps=1, kind="constant")
    assert [schedule.rate(step) for step in range(12)] == [1.0] + [2.0] * 11


@given(
    total=st.integers(1, 50),
    warmup=st.integers(0, 60),
    kind=st.sampled_from(["cosine", "linear", "constant"]),
    ratio=st.floats(0, 1),
)
def test_schedule_is_never_out_of_bounds(total: int, warmup: int, kind: str, ratio: float) -> None:
    schedule = LearningRateSchedule(1.0, total, warmup, kind, ratio)
    for step in range(total + 5):
        assert min(ratio, 1 / (warmup + 1)) - 1e-12 <= schedule.rate(step) <= 1.0 + 1e-12


def test_default_warmup() -> None:
    assert [default_warmup(steps) for steps in (1, 50, 100_000)] == [0, 5, 2000]


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("position_type", ["axial", "absolute"])
def test_only_matrices_of_linear_layers_decay(tiny_config: ReformerLMConfig, tie: bool, position_type: str) -> None:
    settings = {**tiny_config.to_dict(), "tie_word_embeddings": tie, "position_type": position_type}
    settings["lm_head_bias"] = True
    if position_type == "absolute":
        settings["axial_shape"] = None
    model = ReformerLMForCausalLM(ReformerLMConfig(**settings))
    decayed, spared = split_by_decay(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert sorted([names[id(p)] for p in [*decayed, *spared]]) == sorted(names.values())
    assert {p.dim() for p in decayed} == {2}
    decayed_names = [names[id(p)] for p in decayed]
    assert not any("embedding" in name or "norm" in name or "bias" in name for name in decayed_names)
    assert ("lm_head.weight" in decayed_names) != tie
    # Whatever is spared although it is a matrix is an embedding.
    assert all("embedding" in names[id(p)] for p in spared if p.dim() > 1)


def test_optimizer_decays_one_group(tiny_config: ReformerLMConfig) -> None:
    model = ReformerLMForCausalLM(tiny_config)
    model.lm_head.weight.requires_grad_(False)
    optimizer = build_optimizer(model, 0.5, 0.25)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.0]
    assert not any(p is model.lm_head.weight for group in optimizer.param_groups for p in group["params"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decayed = {id(p) for p in split_by_decay(model)[0]}
    for name, parameter in model.named_parameters():
        factor = 1 - 0.5 * 0.25 if id(parameter) in decayed else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]
