import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from reformer_lm.errors import InputError
from reformer_lm.training.checkpoints import load_state, save_state
from reformer_lm.training.state import (
    DataIdentity,
    Progress,
    capture_random_state,
    restore_random_state,
    seed_everything,
)


def draw() -> list[float]:
    values = [random.random(), random.gauss(0, 1), np.random.random(), np.random.standard_normal()]
    return [*values, *torch.rand(3).tolist(), float(torch.randn(()))]


def test_random_numbers_continue_from_a_file(tmp_path: Path) -> None:
    seed_everything(3)
    draw()
    save_state(tmp_path, capture_random_state())
    expected = draw()
    seed_everything(4)
    assert draw() != expected
    restore_random_state(load_state(tmp_path))
    assert draw() == expected


def test_seeds_repeat_and_differ() -> None:
    draws = []
    for seed in (0, 0, 1, 2**40):
        seed_everything(seed)
        draws.append(draw())
    assert draws[0] == draws[1]
    assert len({tuple(values) for values in draws}) == 3


def test_progress_remembers_first_last_and_best() -> None:
    progress = Progress()
    for step, loss in [(0, 5.0), (10, 3.0), (20, 4.0)]:
        progress.step = step
        progress.record_validation(loss)
    assert (progress.first_loss, progress.last_loss, progress.best_loss, progress.best_step) == (5.0, 4.0, 3.0, 10)


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"stride": 3}, "--stride was 3, now 8"),
        ({"seed": 3}, "--seed was 3, now 0"),
        ({"max_seq_len": 3}, "--max_seq_len was 3, now 16"),
        ({"num_tokens": 3}, "the training corpus was another one"),
        ({"corpus": "b"}, "the training corpus was another one"),
    ],
)
def test_other_data_is_refused(change: dict[str, int], fragment: str) -> None:
    identity = DataIdentity(100, "a", 16, 8, 0)
    saved = dataclasses.asdict(identity)
    identity.require_same(saved)
    with pytest.raises(InputError) as error:
        identity.require_same({**saved, **change})
    assert fragment in str(error.value)
    assert "--init_from" in str(error.value)
