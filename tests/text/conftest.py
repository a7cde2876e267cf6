"""Tokenizers of every kind, each built once."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from reformer_lm.text import load_tokenizer
from reformer_lm.text.learning import learn_bpe, learn_words
from reformer_lm.text.tokenizer import wrap_backend

CORPUS = [
    "今天天气很好，我们去公园散步。\n公园里有很多人，孩子们在草地上跑来跑去。",
    "我们去公园散步，天气很好。他说：“Hello world, hello again!”\n\n我们回家了。",
    "今天我们学习自然语言处理。Reformer is a model; the model is long. 版本 3.14 发布了。",
    "孩子们在公园学习自然语言，hello world 是他们的第一句话。",
    "你好，中国人！今天气很好？我们去公园：你好、中国——《中国人》（你好）·……；“你”",
] * 2

# reformer-chinese's order of special tokens; as in BERT's own vocabularies punctuation has no ## pieces.
BERT_LIKE_TOKENS = [
    "[SEP]",
    "[CLS]",
    "[MASK]",
    "[PAD]",
    "[UNK]",
    "[unused1]",
    *string.digits,
    *string.ascii_lowercase,
    *(f"##{character}" for character in string.digits + string.ascii_lowercase),
    *string.punctuation,
    "hello",
    "wor",
    "##ing",
    "##ld",
    "é",
    "##é",
    "α",
    *"你好中国人今天气很我们去公园一二三",
    *(f"##{character}" for character in "你好中国人"),
    *"，。！？：“”…—·《》、（）",
]


@pytest.fixture(scope="session")
def bert_like_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    path.write_text("\n".join(BERT_LIKE_TOKENS) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def default_tokenizer() -> PreTrainedTokenizerFast:
    return load_tokenizer()


@pytest.fixture(scope="session")
def tokenizer_of_kind(
    default_tokenizer: PreTrainedTokenizerFast, bert_like_vocabulary: Path
) -> Callable[[str], PreTrainedTokenizerFast]:
    tokenizers = {
        "default": default_tokenizer,
        "keep_case": load_tokenizer(keep_case=True),
        "bert_like": load_tokenizer(bert_like_vocabulary),
        "bpe": wrap_backend(learn_bpe(CORPUS, vocab_size=700, min_frequency=2)),
        "bpe_keep_case": wrap_backend(learn_bpe(CORPUS, vocab_size=700, min_frequency=1, keep_case=True)),
        "words": wrap_backend(learn_words(CORPUS, vocab_size=700, min_frequency=2)),
    }
    return tokenizers.__getitem__


KINDS = ["default", "keep_case", "bert_like", "bpe", "bpe_keep_case", "words"]


@pytest.fixture(params=KINDS)
def tokenizer(
    request: pytest.FixtureRequest, tokenizer_of_kind: Callable[[str], PreTrainedTokenizerFast]
) -> PreTrainedTokenizerFast:
    return tokenizer_of_kind(request.param)
