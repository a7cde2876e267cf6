"""How fluent a model finds texts: what ``predict.py --ppl`` does."""

from reformer_lm.scoring.scores import Score, ScoreTotals, score, score_stream

__all__ = ["Score", "ScoreTotals", "score", "score_stream"]
