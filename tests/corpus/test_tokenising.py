"""Tokenising in several processes, interrupted, killed and continued, comes to the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import PreTrainedTokenizerFast

from reformer_lm.corpus import CorpusSource, Reading, blocks, build_shards, choose_workers, tokenising
from reformer_lm.corpus.blocks import BlockFolder
from reformer_lm.errors import InputError

ROOT = Path(__file__).parents[2]
CHARACTERS = "春夏秋冬天地山水风花雪月人有大小上下一二三四五六七八九十，。！？的了是不在我你他"
SourceOf = Callable[[Sequence[str]], CorpusSource]


def articles(count: int, seed: int = 0) -> list[str]:
    dice = random.Random(seed)
    texts = ["".join(dice.choices(CHARACTERS + "\n龘", k=dice.randint(0, 60))) for _ in range(count)]
    return [*texts, *texts[: count // 10], "春"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_CHARACTERS", 300)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the blocks that are tokenised."""
    numbers: list[int] = []
    write = BlockFolder.write

    def note(self: BlockFolder, number: int, *others: Any) -> Any:
        numbers.append(number)
        return write(self, number, *others)

    monkeypatch.setattr(BlockFolder, "write", note)
    return numbers


@pytest.mark.usefixtures("small_blocks")
def test_any_number_of_workers_writes_the_same_bytes(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, source_of: SourceOf
) -> None:
    source = source_of(articles(400))
    expected: list[dict[str, bytes]] = []
    for workers in (1, 2, 3):
        places = tmp_path / f"t{workers}", tmp_path / f"v{workers}"
        build_shards(source, tokenizer, places[0], 3, 5, val_split=0.2, validation_directory=places[1], workers=workers)
        expected += [{**files_of(places[0]), **{f"v-{name}": data for name, data in files_of(places[1]).items()}}]
    assert expected[0] == expected[1] == expected[2]
    assert not [p for p in psutil.Process().children(recursive=True) if "forkserver" in " ".join(p.cmdline())]
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_an_interruption_leaves_is_continued(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, source_of: SourceOf, written: list[int], error: Any
) -> None:
    source = source_of(articles(200))
    build_shards(source, tokenizer, tmp_path / "whole", 3)
    total = len(written)
    written.clear()
    write = BlockFolder.write

    def failing(self: BlockFolder, number: int, *others: Any) -> Any:
        if number == 7:
            raise error
        return write(self, number, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockFolder, "write", failing)
        with pytest.raises((KeyboardInterrupt, InputError)):
            build_shards(source, tokenizer, tmp_path / "tokens", 3)
    assert not (tmp_path / "tokens").exists()
    written.clear()
    kept: list[int] = []
    build_shards(source, tokenizer, tmp_path / "tokens", 3, on_resume=kept.append)
    assert written == list(range(7, total))
    assert len(kept) == 1
    assert kept[0] > 7
    assert files_of(tmp_path / "tokens") == files_of(tmp_path / "whole")
    assert not (tmp_path / "tokens.partial").exists()


@pytest.mark.usefixtures("small_blocks")
def test_what_other_work_left_is_not_used(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, source_of: SourceOf, written: list[int]
) -> None:
    texts = articles(100)
    source = source_of(texts)
    build_shards(source, tokenizer, tmp_path / "whole", 1)
    total = len(written)
    changed = CorpusSource(source.files, Reading(encoding="gb18030"))

    def interrupted(**settings: Any) -> None:
        def failing(self: BlockFolder, number: int, *others: Any) -> Any:
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(BlockFolder, "write", failing)
            with pytest.raises(KeyboardInterrupt):
                build_shards(settings.pop("source", source), tokenizer, tmp_path / "tokens", 1, **settings)

    for settings in ({"min_length": 1}, {"source": changed}, {"source": source_of(texts[1:])}):
        interrupted(**settings)
        left = [path for path in (tmp_path / "tokens.partial").iterdir() if path.name != "lock"]
        assert len(left) == 1
        for name in ("block-000000.json", "block-000000.bin"):
            (left[0] / name).write_text("of another corpus")
    written.clear()
    build_shards(source, tokenizer, tmp_path / "tokens", 1)
    assert len(written) == total
    assert files_of(tmp_path / "tokens") == files_of(tmp_path / "whole")


SCRIPT = """
import sys
from reformer_lm.corpus import CorpusSource, blocks, build_shards
from reformer_lm.text import load_tokenizer
if __name__ == "__main__":
    blocks.BLOCK_CHARACTERS = 300
    build_shards(CorpusSource([sys.argv[1]]), load_tokenizer(sys.argv[2]), sys.argv[3], 3, workers=int(sys.argv[4]))
"""


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_killed_run_is_continued(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    vocabulary: Path,
    source_of: SourceOf,
    written: list[int],
    workers: int,
) -> None:
    source = source_of(articles(15_000))
    (tmp_path / "script.py").write_text(SCRIPT)
    arguments = [source.files[0], vocabulary, tmp_path / "tokens", workers]
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("tokens.partial/*/block-*.json"))) < 40:
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "tokens").exists()
    # Its workers see the end of their pipes, after the block they are at.
    time.sleep(0.5)
    records = sorted(tmp_path.glob("tokens.partial/*/block-*.json"))
    left = {int(path.stem.removeprefix("block-")) for path in records}
    # As a machine that lost power might leave them.
    half = records[3].with_suffix(".bin")
    half.write_bytes(half.read_bytes()[:-1])
    records[5].write_bytes(records[5].read_bytes()[:-20])
    records[9].with_suffix(".bin").unlink()
    flipped = bytearray(records[11].with_suffix(".bin").read_bytes())
    flipped[len(flipped) // 2] ^= 1
    records[11].with_suffix(".bin").write_bytes(flipped)
    build_shards(source, tokenizer, tmp_path / "tokens", 3)
    total = max(written) + 1
    assert len(left) < total
    assert sorted(written) == sorted(({*range(total)} - left) | {3, 5, 9, 11})
    build_shards(source, tokenizer, tmp_path / "whole", 3)
    assert files_of(tmp_path / "tokens") == files_of(tmp_path / "whole")


@pytest.mark.usefixtures("small_blocks")
def test_two_runs_do_not_tokenise_in_one_folder(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, source_of: SourceOf
) -> None:
    with (
        tokenising.work_folder(tmp_path / "tokens.partial", "key"),
        pytest.raises(InputError, match=r"another run is tokenising there.*--tokenized_data_path"),
    ):
        build_shards(source_of(articles(10)), tokenizer, tmp_path / "tokens", 1)
    build_shards(source_of(articles(10)), tokenizer, tmp_path / "tokens", 1)


@pytest.mark.usefixtures("small_blocks")
def test_what_goes_wrong_in_a_worker_is_said_here(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, source_of: SourceOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(articles(200))
    take = tokenising._Workers.take

    def sabotaged(self: Any, number: int, block: Any) -> None:
        if number == 3:
            for process in self._processes.values():
                process.kill()
                process.join()
        take(self, number, block)

    with monkeypatch.context() as patch:
        patch.setattr(tokenising._Workers, "take", sabotaged)
        with pytest.raises(InputError, match=r"was killed, perhaps for want of memory.*--workers"):
            build_shards(source, tokenizer, tmp_path / "tokens", 1, workers=2)

    def without_folder(self: Any, number: int, block: Any) -> None:
        if number == 0:
            self._folder.path.rename(self._folder.path.with_name("elsewhere"))
        take(self, number, block)

    with monkeypatch.context() as patch:
        patch.setattr(tokenising._Workers, "take", without_folder)
        with pytest.raises(InputError, match=r"cannot be written \(No such file or directory\)"):
            build_shards(source, tokenizer, tmp_path / "other", 1, workers=2)


def test_the_number_of_workers_follows_the_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    assert [choose_workers(size) for size in (0, 1 << 20, 520 << 20, 10 << 30)] == [1, 1, 2, 4]


def test_progress_counts_the_bytes(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text(json.dumps(articles(50)), encoding="utf-8")
    build_shards(CorpusSource([tmp_path / "a.json"]), tokenizer, tmp_path / "tokens", 1, show_progress=True)
    shown = capsys.readouterr().err
    assert "tokenising: 100%" in shown
    assert "B/s" in shown
