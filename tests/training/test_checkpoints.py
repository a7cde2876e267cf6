import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from reformer_lm.errors import InputError
from reformer_lm.training.checkpoints import (
    STATE_NAME,
    CheckpointStore,
    load_state,
    require_writable_folder,
    save_state,
)


def writer(content: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model").write_text(content)
        save_state(folder, {"content": content})

    return write


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_last_ones_are_kept_and_the_newest_is_published(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "out", kept=2)
    assert store.newest() is None
    for step in (5, 10, 100):
        assert store.save(step, writer(str(step))) == store.newest()
    assert names(store.folder) == ["step-00000010", "step-00000100"]
    assert (store.output_dir / "model").read_text() == "100"
    assert load_state(store.output_dir) == {"content": "100"}
    assert names(store.output_dir) == ["checkpoints", "model", STATE_NAME]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, kept=3)
    for step in (99_999_999, 100_000_000):
        store.save(step, writer(str(step)))
    assert [path.name for path in store.complete()] == ["step-99999999", "step-100000000"]


def test_final_files_stand_in_for_removed_checkpoints(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    folder = store.save(3, writer("3"))
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert store.newest() == tmp_path
    assert load_state(tmp_path) == {"content": "3"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("write\nfailed")])
def test_a_failed_save_leaves_the_earlier_one_whole(tmp_path: Path, error: Exception) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, writer("1"))

    def failing(folder: Path) -> None:
        (folder / "model").write_text("half")
        raise error

    with pytest.raises(
        InputError, match=r"step-00000002.*cannot be saved \((No space left on device|write)\)"
    ) as raised:
        store.save(2, failing)
    assert "\n" not in str(raised.value)
    assert names(store.folder) == ["step-00000001"]
    assert (tmp_path / "model").read_text() == "1"
    assert load_state(store.newest() or Path()) == {"content": "1"}


def test_a_killed_save_is_neither_found_nor_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, writer("1"))

    class Killed(BaseException):
        pass

    def killed(folder: Path) -> None:
        # A kill runs no clean-up: the half-written folder is seen as it is at that moment.
        assert names(store.folder) == ["step-00000001", "step-00000002.partial"]
        assert [path.name for path in store.complete()] == ["step-00000001"]
        raise Killed

    with pytest.raises(Killed):
        store.save(2, killed)
    (store.folder / "step-00000002.partial").mkdir()
    (store.folder / "step-00000002.partial" / "model").write_text("half")
    assert store.newest() == store.folder / "step-00000001"
    store.save(3, writer("3"))
    assert names(store.folder) == ["step-00000001", "step-00000003"]


def test_an_earlier_run_is_replaced_by_the_first_save_only(tmp_path: Path) -> None:
    earlier = CheckpointStore(tmp_path)
    earlier.save(3, writer("earlier 3"))
    earlier.save(900, writer("earlier 900"))
    store = CheckpointStore(tmp_path, replace_beyond=0)
    assert [path.name for path in store.complete()] == ["step-00000003", "step-00000900"]
    with pytest.raises(InputError):
        store.save(3, lambda folder: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert names(store.folder) == ["step-00000003", "step-00000900"]
    store.save(3, writer("new 3"))
    assert names(store.folder) == ["step-00000003"]
    assert load_state(store.folder / "step-00000003") == {"content": "new 3"}
    store.save(4, writer("new 4"))
    assert names(store.folder) == ["step-00000003", "step-00000004"]


def test_publishing_copies_where_links_are_impossible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*arguments: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    store = CheckpointStore(tmp_path)
    store.save(1, writer("1"))
    assert (tmp_path / "model").read_text() == "1"
    assert (tmp_path / "model").stat().st_nlink == 1


def test_state_holds_tensors_and_plain_values_only(tmp_path: Path) -> None:
    save_state(tmp_path, {"a": torch.arange(3), "b": [1, (2.5, None, "x")]})
    state = load_state(tmp_path)
    assert torch.equal(state["a"], torch.arange(3))
    assert state["b"] == [1, (2.5, None, "x")]
    with pytest.raises(InputError, match="damaged"):
        # A path is code to be run, for pickle.
        save_state(tmp_path, {"a": tmp_path})
        load_state(tmp_path)


def test_missing_and_damaged_states_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"training_state.pt is missing.*--init_from"):
        load_state(tmp_path)
    save_state(tmp_path, {"a": torch.arange(3000)})
    (tmp_path / STATE_NAME).write_bytes((tmp_path / STATE_NAME).read_bytes()[:2000])
    with pytest.raises(InputError, match=r"training_state.pt: damaged"):
        load_state(tmp_path)
    torch.save([1], tmp_path / STATE_NAME)
    with pytest.raises(InputError, match="no training state"):
        load_state(tmp_path)


def test_folders_are_tried_not_asked(tmp_path: Path) -> None:
    require_writable_folder(tmp_path / "a" / "b", "--output_dir")
    assert names(tmp_path / "a" / "b") == []
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file: this is a file; give a folder \(--output_dir\)"):
        require_writable_folder(tmp_path / "file", "--output_dir")
    for path in (tmp_path / "file" / "folder", "/proc/folder"):
        with pytest.raises(InputError, match=r"folder cannot be written \(.*\); give another \(--output_dir\)"):
            require_writable_folder(path, "--output_dir")


def test_the_best_checkpoint_stays_beside_the_last_ones(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, kept=2)
    for step, best in ((1, None), (2, 2), (3, 2), (4, 2), (5, 2), (6, 6), (7, 6)):
        store.save(step, writer(str(step)), best)
    assert names(store.folder) == ["step-00000006", "step-00000007"]
    assert (tmp_path / "best" / "model").read_text() == "6"
    assert not (tmp_path / "best" / STATE_NAME).exists()
    store.save(8, writer("8"), 6)
    store.save(9, writer("9"), 6)
    assert names(store.folder) == ["step-00000006", "step-00000008", "step-00000009"]
    assert (tmp_path / "model").read_text() == "9"
    assert store.newest() == store.of_step(9)


def test_a_restored_step_replaces_the_later_ones(tmp_path: Path) -> None:
    earlier = CheckpointStore(tmp_path, kept=5)
    for step in (2, 4, 6, 8):
        earlier.save(step, writer(str(step)))
    store = CheckpointStore(tmp_path, kept=5, replace_beyond=4)
    store.save(5, writer("new 5"))
    assert names(store.folder) == ["step-00000002", "step-00000004", "step-00000005"]
    store.save(6, writer("new 6"))
    assert (store.newest() or Path(), (tmp_path / "model").read_text()) == (store.of_step(6), "new 6")


def test_a_kill_between_checkpoint_and_folder_is_made_good(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, kept=1)
    store.save(1, writer("1"), 1)
    for _ in range(2):
        # As a kill would leave it: the checkpoint is there, and nothing after that was done.
        store.of_step(2).mkdir(exist_ok=True)
        writer("2")(store.of_step(2))
        (store.folder / "step-00000000.removed").mkdir()
        store.settle(store.of_step(2), 2)
        assert names(store.folder) == ["step-00000002"]
        assert (tmp_path / "model").read_text() == (tmp_path / "best" / "model").read_text() == "2"
        assert load_state(tmp_path) == {"content": "2"}
        (tmp_path / STATE_NAME).unlink()
