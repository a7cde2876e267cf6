"""How fluent a model finds texts: what ``predict.py --ppl`` does."""

from reformer_lm.scoring.distributed import score_distributed
from reformer_lm.scoring.scores import Score, ScoreTotals
from reformer_lm.scoring.stream import ScoringOptions, check_options, score, score_stream

__all__ = ["Score", "ScoreTotals", "ScoringOptions", "check_options", "score", "score_distributed", "score_stream"]
