import math
from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reformer_lm import ReformerLMConfig, ReformerLMForCausalLM
from reformer_lm.training.muon import Float32Muon, orthogonalized
from reformer_lm.training.optimization import (
    OPTIMIZERS,
    SCHEDULES,
    LearningRateSchedule,
    OptimizerChain,
    build_optimizer,
    default_warmup,
    set_learning_rate,
    split_by_decay,
    state_bytes,
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
    kind=st.sampled_from(SCHEDULES),
    ratio=st.floats(0, 1),
    share=st.floats(0, 1),
)
def test_schedule_is_never_out_of_bounds(total: int, warmup: int, kind: str, ratio: float, share: float) -> None:
    schedule = LearningRateSchedule(1.0, total, warmup, kind, ratio, share)
    for step in range(total + 5):
        assert min(ratio, 1 / (warmup + 1)) - 1e-12 <= schedule.rate(step) <= 1.0 + 1e-12


def test_warmup_stable_decay_decays_at_the_end_alone() -> None:
    schedule = LearningRateSchedule(2.0, total_steps=100, warmup_steps=9, kind="wsd", floor_ratio=0.1, decay_share=0.2)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[:9] == pytest.approx([0.2 * (step + 1) for step in range(9)])
    assert rates[9:80] == [2.0] * 71
    assert rates[79:] == pytest.approx([2.0 - 1.8 * step / 20 for step in range(21)])
    # A longer run has the same rates until the shorter one's decay.
    longer = LearningRateSchedule(2.0, total_steps=200, warmup_steps=9, kind="wsd", floor_ratio=0.1, decay_share=0.2)
    assert [longer.rate(step) for step in range(80)] == rates[:80]


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


def step_with(optimizer: torch.optim.Optimizer, model: torch.nn.Module, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=random)
    optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_goes_on_from_its_state(kind: str, tiny_config: ReformerLMConfig) -> None:
    model = ReformerLMForCausalLM(tiny_config)
    copy = ReformerLMForCausalLM(tiny_config)
    optimizer, again = (build_optimizer(m, 0.01, 0.1, kind) for m in (model, copy))
    step_with(optimizer, model, 0)
    step_with(optimizer, model, 1)
    copy.load_state_dict(model.state_dict())
    # A file would hold a copy, too.
    again.load_state_dict(deepcopy(optimizer.state_dict()))
    for group in again.param_groups:
        assert group["lr"] == 0.01
    set_learning_rate(again, 0.02)
    set_learning_rate(optimizer, 0.02)
    before = model.lm_head.weight.detach().clone()
    step_with(optimizer, model, 2)
    step_with(again, copy, 2)
    assert not torch.equal(model.lm_head.weight, before)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, copy.get_parameter(name)), name


@pytest.mark.parametrize("tie", [True, False])
def test_muon_moves_the_matrices_of_the_layers_and_adamw_the_rest(tie: bool, tiny_config: ReformerLMConfig) -> None:
    settings = {**tiny_config.to_dict(), "tie_word_embeddings": tie}
    torch.manual_seed(0)
    model = ReformerLMForCausalLM(ReformerLMConfig(**settings))
    torch.manual_seed(0)
    reference = ReformerLMForCausalLM(ReformerLMConfig(**settings))
    chain = build_optimizer(model, 0.01, 0.1, "muon")
    assert isinstance(chain, OptimizerChain)
    muon, adamw = chain.members
    names = {id(p): name for name, p in model.named_parameters()}
    by_muon = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    by_adamw = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert by_muon | by_adamw == set(names.values()) and not by_muon & by_adamw
    assert all("stack.layers" in name for name in by_muon)
    assert all(model.get_parameter(name).dim() == 1 or "stack" not in name for name in by_adamw)

    step_with(chain, model, 0)
    step_with(build_optimizer(reference, 0.01, 0.1, "adamw"), reference, 0)
    for name, parameter in model.named_parameters():
        same = torch.equal(parameter, reference.get_parameter(name))
        assert same == (name in by_adamw), name
    # Orthogonal, but for five rounds of Newton and Schulz: all singular values of the update are about the same.
    name = sorted(by_muon)[0]
    torch.manual_seed(0)
    old = ReformerLMForCausalLM(ReformerLMConfig(**settings)).get_parameter(name).detach()
    update = model.get_parameter(name).detach() - old * (1 - 0.01 * 0.1)
    values = torch.linalg.svdvals(update)
    assert values.max() / values.min() < 3


def test_a_state_of_another_optimizer_is_refused(tiny_config: ReformerLMConfig) -> None:
    model = ReformerLMForCausalLM(tiny_config)
    state = build_optimizer(model, 0.01, 0.1, "adamw").state_dict()
    with pytest.raises(ValueError, match="parameter group"):
        build_optimizer(model, 0.01, 0.1, "muon").load_state_dict(state)


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_in_float32_is_torchs_but_for_bfloat16(shape: tuple[int, int], nesterov: bool) -> None:
    random = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=random)
    parameters = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    options = {"lr": 0.1, "weight_decay": 0.3, "nesterov": nesterov, "adjust_lr_fn": "match_rms_adamw"}
    ours, theirs = Float32Muon(parameters[:1], **options), torch.optim.Muon(parameters[1:], **options)
    for _ in range(4):
        gradient = torch.randn(shape, generator=random)
        for parameter, optimizer in zip(parameters, (ours, theirs), strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    moved = (parameters[1] - start).norm()
    assert (parameters[0] - parameters[1]).norm() < 0.02 * moved


def test_orthogonalized_keeps_the_singular_vectors() -> None:
    matrix = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = orthogonalized(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inner = left.mT @ result @ right.mT
    assert (inner - inner.diag().diag()).abs().max() < 1e-9
    assert inner.diag().min() > 0.5 and inner.diag().max() < 1.5
    torch.testing.assert_close(orthogonalized(matrix.mT, (3.4445, -4.7750, 2.0315), 5, 1e-7), result.mT)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_state_is_as_large_as_said(kind: str, tiny_config: ReformerLMConfig) -> None:
    model = ReformerLMForCausalLM(tiny_config)
    optimizer = build_optimizer(model, 0.01, 0.1, kind)
    step_with(optimizer, model, 0)
    tensors = [x for entry in optimizer.state_dict()["state"].values() for x in entry.values()]
    # All but the counters of steps.
    size = sum(x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor) and x.dim())
    assert size == state_bytes(model, kind)
