"""Modules over `reformer_lm.ops`: attention, feed-forward, positions and the reversible stack."""

from reformer_lm.layers.attention import LSHSelfAttention
from reformer_lm.layers.feed_forward import FeedForward
from reformer_lm.layers.positions import PositionEmbedding, apply_rotary, rotary_angles, rotary_factors
from reformer_lm.layers.reversible import ReversibleStack
from reformer_lm.layers.sequence import SequenceInfo

__all__ = [
    "FeedForward",
    "LSHSelfAttention",
    "PositionEmbedding",
    "ReversibleStack",
    "SequenceInfo",
    "apply_rotary",
    "rotary_angles",
    "rotary_factors",
]
