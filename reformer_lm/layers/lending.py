"""Modules that compute with another module's weights, as the layers of a model with shared weights do."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from torch import nn


class Borrower(nn.Module):
    """A module that has parts of its own, or uses those of another of its kind.

    What is lent is no submodule of the borrower: it belongs to the lender alone, stands in a saved model once, and
    counts once among a model's parameters.

    Args:
        lender: whose parts to use; None for parts of its own, which a subclass then makes.

    Attributes:
        lent: names of the parts.
    """

    lent: ClassVar[tuple[str, ...]] = ()

    def __init__(self, lender: Self | None) -> None:
        super().__init__()
        # A tuple, since a module would be registered.
        self.lender = None if lender is None else (lender,)

    def __getattr__(self, name: str) -> Any:
        """Parts are looked up at the lender each time: there they may be replaced, by an adapter for instance."""
        lender = self.__dict__.get("lender")
        return getattr(lender[0], name) if lender and name in self.lent else super().__getattr__(name)
