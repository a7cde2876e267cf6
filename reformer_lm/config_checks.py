"""Checks of a configuration's values; what fails says the field, its value and the remedy."""

from __future__ import annotations

import math
from collections.abc import Sequence


def impossible(name: str, value: object, remedy: str) -> ValueError:
    """The error of a field whose value cannot be."""
    return ValueError(f"{name}={value!r} is not possible: {remedy}")


def require_count(name: str, value: object, least: int, optional: bool = False) -> None:
    """Makes sure that a field is a whole number of at least ``least``, or None where it is optional.

    Raises:
        ValueError: it is not.
    """
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise impossible(name, value, f"give a whole number of at least {least}")


def require_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Makes sure that a field is one of some strings.

    Raises:
        ValueError: it is not.
    """
    if value not in choices:
        raise impossible(name, value, "choose " + ", ".join(f'"{choice}"' for choice in choices))


def check_positions(
    position_type: str,
    width: int,
    longest: int,
    axial_shape: Sequence[int] | None,
    axial_dims: Sequence[int] | None,
) -> None:
    """Makes sure that the fields of the position embedding fit together.

    Args:
        position_type: kind of positions.
        width: of the embedding.
        longest: max_position_embeddings.
        axial_shape: as given.
        axial_dims: as given.

    Raises:
        ValueError: they do not.
    """
    if position_type == "sinusoidal" and width % 2:
        raise impossible("embedding_size", width, "make it even for sinusoidal positions")
    if position_type != "axial":
        for name, value in (("axial_shape", axial_shape), ("axial_dims", axial_dims)):
            if value is not None:
                remedy = f'leave it out, or set position_type="axial" (it is "{position_type}")'
                raise impossible(name, value, remedy)
        return
    if axial_shape is not None:
        if len(axial_shape) != 2 or any(not isinstance(side, int) or side < 1 for side in axial_shape):
            raise impossible("axial_shape", axial_shape, "give two positive whole numbers")
        if math.prod(axial_shape) < longest:
            raise impossible(
                "axial_shape",
                axial_shape,
                f"its product is {math.prod(axial_shape)}; make it at least max_position_embeddings ({longest})",
            )
    if axial_dims is not None and (len(axial_dims) != 2 or min(axial_dims) < 1 or sum(axial_dims) != width):
        raise impossible("axial_dims", axial_dims, f"give two numbers that add up to {width}, or leave it out")
