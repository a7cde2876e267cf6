import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from reformer_lm.corpus import CorpusSource
from reformer_lm.text import load_tokenizer

CHARACTERS = "春夏秋冬天地山水风花雪月人有大小上下一二三四五六七八九十，。！？的了是不在我你他"


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(["[SEP]", "[CLS]", "[MASK]", "[PAD]", "[UNK]", *CHARACTERS]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer(vocabulary: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(vocabulary)


@pytest.fixture
def source_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Sequence[str]], CorpusSource]:
    """A corpus of one file with these articles."""

    def write(articles: Sequence[str]) -> CorpusSource:
        path = tmp_path_factory.mktemp("corpus") / "articles.json"
        path.write_text(json.dumps(list(articles)), encoding="utf-8")
        return CorpusSource([path])

    return write
