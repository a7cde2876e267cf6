"""reformer_lm: language models of long Chinese text with exactly causal LSH attention."""

from reformer_lm.cache import LSHCache
from reformer_lm.config import ReformerLMConfig
from reformer_lm.errors import InputError
from reformer_lm.layers.recording import AttentionRecord, record_attention
from reformer_lm.model import ReformerLMForCausalLM, ReformerLMModel
from reformer_lm.version import __version__
from reformer_lm.wrapper import TrainingWrapper

__all__ = [
    "AttentionRecord",
    "InputError",
    "LSHCache",
    "ReformerLMConfig",
    "ReformerLMForCausalLM",
    "ReformerLMModel",
    "TrainingWrapper",
    "__version__",
    "record_attention",
]
