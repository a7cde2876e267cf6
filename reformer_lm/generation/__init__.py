"""Texts from a model: what ``predict.py`` does without ``--ppl``."""

from reformer_lm.generation.conversation import Conversation
from reformer_lm.generation.generator import GeneratedText, TextGenerator
from reformer_lm.generation.sampling import GenerationSettings

__all__ = ["Conversation", "GeneratedText", "GenerationSettings", "TextGenerator"]
