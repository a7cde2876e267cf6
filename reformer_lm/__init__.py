"""reformer_lm: language models of long Chinese text with exactly causal LSH attention."""

from reformer_lm.backbone import ReformerLMModel
from reformer_lm.cache import LSHCache
from reformer_lm.config import ReformerLMConfig
from reformer_lm.encoder_decoder import ReformerEncDecConfig, ReformerLMForConditionalGeneration
from reformer_lm.errors import InputError
from reformer_lm.heads.classification import ReformerLMForSequenceClassification, ReformerLMForTokenClassification
from reformer_lm.heads.masked_lm import ReformerLMForMaskedLM
from reformer_lm.layers.recording import AttentionRecord, record_attention
from reformer_lm.model import ReformerLMForCausalLM
from reformer_lm.version import __version__
from reformer_lm.wrapper import TrainingWrapper

__all__ = [
    "AttentionRecord",
    "InputError",
    "LSHCache",
    "ReformerEncDecConfig",
    "ReformerLMConfig",
    "ReformerLMForCausalLM",
    "ReformerLMForConditionalGeneration",
    "ReformerLMForMaskedLM",
    "ReformerLMForSequenceClassification",
    "ReformerLMForTokenClassification",
    "ReformerLMModel",
    "TrainingWrapper",
    "__version__",
    "record_attention",
]
