import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from reformer_lm import ReformerLMConfig, ReformerLMForCausalLM
from reformer_lm.corpus import EvaluationWindows, TokenStream, TokenWindows
from reformer_lm.text import load_tokenizer
from reformer_lm.training.batches import TrainingPlan
from reformer_lm.training.checkpoints import CheckpointStore
from reformer_lm.training.devices import create_accelerator
from reformer_lm.training.interruption import StopRequest
from reformer_lm.training.loop import LoopSettings, TrainingLoop
from reformer_lm.training.optimization import LearningRateSchedule, build_optimizer
from reformer_lm.training.reporting import Reporter
from reformer_lm.training.state import DataIdentity

CHARACTERS = "春夏秋冬天地山水风花雪月人有大小上下一二三四五六七八九十，。！？的了是不在我你他"
TINY_MODEL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "bucket_size": 4,
    "num_hashes": 2,
}


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(["[SEP]", "[CLS]", "[MASK]", "[PAD]", "[UNK]", *CHARACTERS]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer(vocabulary: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(vocabulary)


@pytest.fixture(scope="session")
def articles() -> list[str]:
    """Texts with something to learn in them: successors in a fixed order, from different places."""
    return ["".join(CHARACTERS[(start + 3 * i) % len(CHARACTERS)] for i in range(30)) for start in range(12)]


@pytest.fixture
def workplace(tmp_path: Path, vocabulary: Path, articles: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a corpus and a configuration where the defaults look for them."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.json").write_text(json.dumps(articles), encoding="utf-8")
    (tmp_path / "data" / "val.json").write_text(json.dumps(articles[:2]), encoding="utf-8")
    (tmp_path / "configs").mkdir()
    training = {"tokenizer_path": str(vocabulary), "batch_size": 4, "lr": 0.01, "device": "cpu"}
    content = {"model": {**TINY_MODEL, "hidden_dropout_prob": 0.1}, "training": training}
    (tmp_path / "configs" / "tiny.json").write_text(json.dumps(content), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny_config(tokenizer: PreTrainedTokenizerFast) -> ReformerLMConfig:
    return ReformerLMConfig(vocab_size=len(tokenizer), **TINY_MODEL)


@pytest.fixture
def make_loop(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., TrainingLoop]:
    """Put a loop together around a model; anything can be replaced."""

    def make(model: ReformerLMForCausalLM, **changes: Any) -> TrainingLoop:
        tokens = np.random.default_rng(0).integers(5, len(tokenizer), 10 * 16).astype(np.uint16)
        windows = TokenWindows(TokenStream([tokens]), 16, 16)
        plan = changes.pop("plan", TrainingPlan(len(windows), batch_size=6, gradient_accumulation=1, epochs=2, seed=0))
        parts: dict[str, Any] = {
            "accelerator": create_accelerator(torch.device("cpu")),
            "model": model,
            "optimizer": build_optimizer(model, 0.01, 0.1),
            "tokenizer": tokenizer,
            "windows": windows,
            "validation": EvaluationWindows(TokenStream([tokens[:50]]), 16),
            "plan": plan,
            "schedule": LearningRateSchedule(0.01, plan.total_steps(), 1),
            "store": CheckpointStore(tmp_path / "model"),
            "settings": LoopSettings(batch_size=2),
            "identity": DataIdentity(len(tokens), "corpus", 16, 16, 0),
            "reporter": Reporter(quiet=True),
            "stop": StopRequest(),
            "options": {},
        }
        return TrainingLoop(**{**parts, **changes})

    return make
