"""Training: ``main`` is the program train_reformer.py (``reformer-train``)."""

from __future__ import annotations

from reformer_lm.training.arguments import TrainingArguments, parse_arguments
from reformer_lm.training.command import main
from reformer_lm.training.loop import LoopSettings, TrainingLoop

__all__ = ["LoopSettings", "TrainingArguments", "TrainingLoop", "main", "parse_arguments"]
