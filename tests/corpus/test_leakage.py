from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from reformer_lm.corpus import CorpusSource, build_shards, find_leaks, leakage
from reformer_lm.errors import InputError

SourceOf = Callable[[Sequence[str]], CorpusSource]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    training=st.lists(st.text("春天", min_size=1, max_size=3), min_size=1, max_size=12),
    validation=st.lists(st.text("春天\n", min_size=1, max_size=3).filter(str.strip), min_size=1, max_size=12),
    pieces=st.integers(1, 3),
)
def test_exactly_the_articles_of_both_are_found(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerFast,
    source_of: SourceOf,
    training: list[str],
    validation: list[str],
    pieces: int,
) -> None:
    folder = tmp_path_factory.mktemp("leaks")
    build_shards(source_of(training), tokenizer, folder / "t", pieces)
    build_shards(source_of(validation), tokenizer, folder / "v", pieces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leakage, "COMPARED_AT_ONCE", 2)
        leaks = find_leaks(folder / "t", folder / "v")
    assert leaks.num_articles == len(validation)
    assert leaks.articles == tuple(n for n, text in enumerate(validation) if "".join(text.split()) in training)


def test_white_space_and_case_hide_nothing(tmp_path: Path, source_of: SourceOf) -> None:
    from reformer_lm.text import load_tokenizer

    tokenizer = load_tokenizer()
    build_shards(source_of(["春天来了。\nSpring is here.", "夏天"]), tokenizer, tmp_path / "t", 2)
    build_shards(source_of(["秋天", "　春天来了。  SPRING\tis\r\n\nhere."]), tokenizer, tmp_path / "v", 1)
    assert find_leaks(tmp_path / "t", tmp_path / "v").articles == (1,)


def test_folders_without_shards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no token shards here"):
        find_leaks(tmp_path, tmp_path)
