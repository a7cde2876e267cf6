from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reformer_lm.corpus import TokenStream, TokenWindows
from reformer_lm.training.batches import BatchMaker, TrainingPlan, count_labels

plans = st.builds(
    TrainingPlan,
    num_windows=st.integers(1, 40),
    batch_size=st.integers(1, 7),
    gradient_accumulation=st.integers(1, 4),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 5),
)


@given(plans)
def test_each_epoch_visits_each_window_once(plan: TrainingPlan) -> None:
    steps = list(plan.steps())
    for epoch in range(plan.epochs):
        seen = [int(w) for step in steps if step.epoch == epoch for batch in step.batches for w in batch]
        assert Counter(seen) == Counter(range(plan.num_windows))
    assert len(steps) == plan.total_steps() == plan.epochs * plan.steps_per_epoch
    for step in steps:
        assert len(step.batches) <= plan.gradient_accumulation
        assert all(len(batch) == plan.batch_size for batch in step.batches[:-1])
        assert 1 <= len(step.batches[-1]) <= plan.batch_size


@given(plans, st.data())
def test_a_run_continues_from_any_position(plan: TrainingPlan, data: st.DataObject) -> None:
    steps = list(plan.steps())
    done = data.draw(st.integers(1, len(steps)))
    position = steps[done - 1]
    rest = list(plan.steps(position.epoch, position.windows_done))
    assert [[b.tolist() for b in s.batches] for s in rest] == [[b.tolist() for b in s.batches] for s in steps[done:]]
    assert plan.total_steps(done, position.epoch, position.windows_done) == len(steps)


@given(plans, st.data())
def test_other_batch_sizes_finish_the_same_epoch(plan: TrainingPlan, data: st.DataObject) -> None:
    steps = list(plan.steps())
    number = data.draw(st.integers(0, len(steps) - 1))
    position = steps[number]
    other = TrainingPlan(plan.num_windows, data.draw(st.integers(1, 9)), 1, plan.epochs, plan.seed)
    rest = list(other.steps(position.epoch, position.windows_done))
    assert other.total_steps(100, position.epoch, position.windows_done) == 100 + len(rest)
    both = [step for step in steps[: number + 1] + rest if step.epoch == position.epoch]
    seen = [int(window) for step in both for batch in step.batches for window in batch]
    assert Counter(seen) == Counter(range(plan.num_windows))


def test_accumulated_batches_are_the_larger_batch() -> None:
    small = TrainingPlan(23, batch_size=2, gradient_accumulation=4, epochs=1, seed=3)
    large = TrainingPlan(23, batch_size=8, gradient_accumulation=1, epochs=1, seed=3)
    for ours, theirs in zip(small.steps(), large.steps(), strict=True):
        assert [w for batch in ours.batches for w in batch] == list(theirs.batches[0])


def test_max_steps_limits_the_total() -> None:
    assert TrainingPlan(10, 1, 1, 5, 0, max_steps=7).total_steps() == 7
    assert TrainingPlan(10, 1, 1, 5, 0, max_steps=700).total_steps() == 50
    assert TrainingPlan(10, 1, 1, 2, 0).total_steps(step=20, epoch=3, windows_done=10) == 20


@given(plans, st.integers(1, 4))
def test_processes_share_each_step_evenly(plan: TrainingPlan, count: int) -> None:
    for step in plan.steps():
        shares = [step.of_process(rank, count) for rank in range(count)]
        assert len({len(share) for share in shares}) == 1
        seen = [int(window) for share in shares for batch in share for window in batch]
        assert Counter(seen) == Counter(int(window) for batch in step.batches for window in batch)


def test_more_processes_are_a_larger_step() -> None:
    one = TrainingPlan(23, batch_size=2, gradient_accumulation=4, epochs=2, seed=3)
    two = TrainingPlan(23, batch_size=2, gradient_accumulation=2, epochs=2, seed=3, num_processes=2)
    assert one.total_steps() == two.total_steps()
    for ours, theirs in zip(one.steps(), two.steps(), strict=True):
        assert [batch.tolist() for batch in ours.batches] == [batch.tolist() for batch in theirs.batches]


def maker(**options: object) -> BatchMaker:
    tokens = np.tile(np.arange(1, 40), 200)[: 100 * 64].astype(np.uint16)
    windows = TokenWindows(TokenStream([tokens]), 64, 64)
    return BatchMaker(windows, seed=1, special_tokens=(0, 1, 2, 3), vocab_size=40, **options)  # type: ignore[arg-type]


def test_without_options_inputs_are_the_labels() -> None:
    inputs, count = maker().make(np.array([3, 7]), 0)
    assert inputs.keys() == {"input_ids", "labels"}
    assert torch.equal(inputs["input_ids"], inputs["labels"])
    assert count == 2 * 63


def test_a_batch_of_nothing_predicts_nothing() -> None:
    inputs, count = maker(noise=0.5, begin_token=1).make(np.zeros(0, dtype=np.int64), 0)
    assert count == 0 == count_labels(inputs["labels"])
    assert inputs["input_ids"].shape == inputs["document_ids"].shape == (1, 64)


def test_noise_replaces_inputs_and_nothing_else() -> None:
    batches = maker(noise=0.3)
    indices = np.arange(100)
    inputs, _ = batches.make(indices, 0)
    clean, noisy = inputs["labels"], inputs["input_ids"]
    assert torch.equal(clean, maker().make(indices, 0)[0]["labels"])
    special = torch.isin(clean, torch.tensor([1, 2, 3]))
    assert torch.equal(clean[special], noisy[special])
    assert noisy.min() >= 1 and noisy[clean != noisy].min() >= 4 and noisy.max() < 40
    # A replacement may be the same token by chance, one in 36.
    share = float((clean != noisy)[~special].double().mean())
    assert share == pytest.approx(0.3 * 35 / 36, abs=0.02)
    # Of seed, epoch and window alone: not of the batch that a window is in.
    alone = torch.cat([batches.make(indices[i : i + 1], 0)[0]["input_ids"] for i in range(100)])
    assert torch.equal(alone, noisy)
    assert not torch.equal(batches.make(indices, 1)[0]["input_ids"], noisy)
    assert not torch.equal(noisy[0] != clean[0], noisy[1] != clean[1])


def test_padding_is_masked_and_never_predicted() -> None:
    class Padded:
        length = 5

        def __len__(self) -> int:
            return 2

        def batch(self, indices: np.ndarray) -> torch.Tensor:
            return torch.tensor([[1, 5, 6, 2, 9], [1, 5, 2, 0, 0]])

    inputs, count = BatchMaker(Padded(), pad_token=0).make(np.array([0, 1]), 0)
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert inputs["labels"].tolist() == [[1, 5, 6, 2, 9], [1, 5, 2, -100, -100]]
    assert count == 4 + 2
