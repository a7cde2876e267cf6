from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from reformer_lm.training.batches import TrainingPlan

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
