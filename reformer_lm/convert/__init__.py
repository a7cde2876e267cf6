"""Weights in and out: reformer-pytorch, reformer-chinese and transformers' Reformer.

On the command line `python -m reformer_lm.convert`; none of these packages is needed to read its files.
"""

from reformer_lm.convert.hf_reformer import from_transformers
from reformer_lm.convert.reformer_pytorch import from_reformer_pytorch, to_reformer_pytorch

__all__ = ["from_reformer_pytorch", "from_transformers", "to_reformer_pytorch"]
