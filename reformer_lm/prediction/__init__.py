"""The program ``predict.py`` (``reformer-predict``): generate text with a trained model, or score it."""

from reformer_lm.prediction.command import main

__all__ = ["main"]
