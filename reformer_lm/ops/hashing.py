"""Locality-sensitive hashing by random rotations, and the order it puts the positions in.

Source: Andoni et al. 2015 (arXiv 1509.02897), section 3, "cross-polytope" hashing by random rotations;
Kitaev et al. 2020 (arXiv 2001.04451), section 2, "Locality sensitive hashing".
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Projections [.., T, n/2] are formed for at most this many elements at a time, so that hashing a million
# tokens needs megabytes and not gigabytes.
_MAX_PROJECTION_ELEMENTS = 1 << 24

# One rotation gives at most this many buckets; more are made of two smaller hashes (bucket = b' * n2 + b'').
MAX_BUCKETS_PER_ROTATION = 128


def factorize_buckets(num_buckets: int) -> tuple[int, ...]:
    """Splits a number of buckets into factors, each hashed by a rotation of its own.

    Args:
        num_buckets: an even number, at least 2.

    Returns:
        ``(num_buckets,)`` up to 128 buckets, else two even factors whose product is at least ``num_buckets``
        and which are as equal as possible. Their product is what the model then uses.

    Raises:
        ValueError: ``num_buckets`` is odd or smaller than 2.

    Source: Kitaev et al. 2020, section 4.1 uses the same trick through trax's ``n_buckets=[n1, n2]``.
    """
    if num_buckets < 2 or num_buckets % 2:
        raise ValueError(f"num_buckets must be an even number >= 2, got {num_buckets}")
    if num_buckets <= MAX_BUCKETS_PER_ROTATION:
        return (num_buckets,)
    first = math.ceil(math.sqrt(num_buckets))
    first += first % 2
    second = math.ceil(num_buckets / first)
    second += second % 2
    return (first, second)


def sample_rotations(
    num_heads: int,
    head_dim: int,
    num_hashes: int,
    bucket_factors: tuple[int, ...],
    seed: int,
) -> tuple[Tensor, ...]:
    """Draws the random rotations of one layer from a generator of their own.

    The global random state is neither read nor changed, and the numbers are drawn on the CPU in float32, so
    the same seed gives the same hash on every device.

    Args:
        num_heads: H.
        head_dim: D.
        num_hashes: R, hash rounds.
        bucket_factors: number of buckets of each factor, each even.
        seed: any 64-bit integer.

    Returns:
        One float32 tensor [H, D, R, n / 2] for each factor n.
    """
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(num_heads, head_dim, num_hashes, factor // 2, generator=generator) for factor in bucket_factors
    )


def _bucket_dtype(num_buckets: int) -> torch.dtype:
    # Buckets are kept for the backward pass: small integers keep that cheap.
    return torch.int16 if num_buckets <= torch.iinfo(torch.int16).max else torch.int32


@torch.no_grad()
def hash_vectors(x_BHTD: Tensor, rotations: tuple[Tensor, ...]) -> Tensor:
    """Hashes every vector once per round: b(x) = argmax([xA ; -xA]).

    Half-precision input is projected in float32: a hash is a discrete decision and must not be taken in bf16.
    A zero vector hashes to bucket 0; no input but NaN gives NaN.

    Args:
        x_BHTD: vectors [B, H, T, D]. No gradient flows through the hash.
        rotations: as returned by `sample_rotations`, on any device; [H, D, R, n / 2] each, or with H = 1.

    Returns:
        Buckets [B, H, R, T], int16 (int32 where there are more than 32,767).
    """
    batch, heads, tokens, _ = x_BHTD.shape
    num_hashes = rotations[0].shape[2]
    num_buckets = math.prod(2 * rotation.shape[-1] for rotation in rotations)
    compute_dtype = torch.promote_types(x_BHTD.dtype, torch.float32)
    widest = max(rotation.shape[-1] for rotation in rotations)
    step = max(1, _MAX_PROJECTION_ELEMENTS // max(1, batch * heads * num_hashes * widest))
    dtype = _bucket_dtype(num_buckets)
    parts = []
    # Autocast would turn the projection into bf16.
    with torch.autocast(device_type=x_BHTD.device.type, enabled=False):
        placed = [rotation.to(device=x_BHTD.device, dtype=compute_dtype) for rotation in rotations]
        for begin in range(0, tokens, step):
            piece = x_BHTD[:, :, begin : begin + step].to(compute_dtype)
            combined: Tensor | None = None
            for rotation in placed:
                half = rotation.shape[-1]
                # [B, H, t, D] @ [H, D, R * n/2] as one matrix product per head.
                flat = rotation.reshape(rotation.shape[0], rotation.shape[1], num_hashes * half)
                projected = torch.matmul(piece, flat).unflatten(-1, (num_hashes, half)).transpose(2, 3)
                # The argmax of [p ; -p], in one search: the largest magnitude and its sign.
                largest = projected.abs().argmax(dim=-1)
                negative = projected.gather(-1, largest.unsqueeze(-1)).squeeze(-1) < 0
                bucket = largest + half * negative
                combined = bucket if combined is None else combined * (2 * half) + bucket
            assert combined is not None
            parts.append(combined.to(dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class StackedRotations(NamedTuple):
    """All factors of some rotations in one matrix, for `hash_next`.

    Attributes:
        matrix: float32 [H, D, R * F * n / 2], n the largest of the F factors; smaller ones are filled up with zeros.
        halves: int64 [F], half of each factor.
        strides: int64 [F], what a bucket of each factor counts in the whole.
        num_hashes: R.
        num_buckets: product of the factors.
    """

    matrix: Tensor
    halves: Tensor
    strides: Tensor
    num_hashes: int
    num_buckets: int


def stack_rotations(rotations: tuple[Tensor, ...]) -> StackedRotations:
    """Lays rotations [H, D, R, n / 2] side by side."""
    halves = [rotation.shape[-1] for rotation in rotations]
    # A column of zeros is never the largest, and of equal ones the first is taken.
    padded = [torch.nn.functional.pad(rotation, (0, max(halves) - rotation.shape[-1])) for rotation in rotations]
    strides = [math.prod(2 * half for half in halves[index + 1 :]) for index in range(len(halves))]
    device = rotations[0].device
    return StackedRotations(
        torch.stack(padded, dim=3).flatten(2),
        torch.tensor(halves, device=device),
        torch.tensor(strides, device=device),
        rotations[0].shape[2],
        math.prod(2 * half for half in halves),
    )


@torch.no_grad()
def hash_next(x_BH1D: Tensor, rotations: StackedRotations) -> Tensor:
    """`hash_vectors` of one vector a row, in as few operations as may be: for decoding.

    Args:
        x_BH1D: vectors [B, H, 1, D].
        rotations: from `stack_rotations`.

    Returns:
        Buckets [B, H, R, 1], as `hash_vectors` gives them.
    """
    wide = x_BH1D[:, :, 0].transpose(0, 1).to(torch.promote_types(x_BH1D.dtype, torch.float32))
    with torch.autocast(device_type=wide.device.type, enabled=False):
        projected = torch.bmm(wide, rotations.matrix.to(wide.dtype))
    # [H, B, R, F, n / 2]
    projected = projected.view(*projected.shape[:2], rotations.num_hashes, len(rotations.halves), -1)
    largest = projected.abs().argmax(dim=-1)
    negative = projected.gather(-1, largest.unsqueeze(-1)).squeeze(-1) < 0
    buckets = (largest + rotations.halves * negative) * rotations.strides
    return buckets.sum(dim=-1).transpose(0, 1).unsqueeze(-1).to(_bucket_dtype(rotations.num_buckets))


class SortedBuckets(NamedTuple):
    """The order of the positions by (bucket, position), once per round.

    Attributes:
        order: [..., T] int64; ``order[i]`` is the position of the token that stands i-th in sorted order.
        inverse: [..., T] int64; ``inverse[t]`` is where position t stands in sorted order.
        start: [..., T] int64; for each place i in sorted order the first place that holds the same bucket.
    """

    order: Tensor
    inverse: Tensor
    start: Tensor


@torch.no_grad()
def sort_by_bucket(buckets: Tensor) -> SortedBuckets:
    """Sorts positions by bucket, keeping their order inside each bucket.

    Args:
        buckets: integers [..., T].

    Returns:
        The order, its inverse and the start of each place's bucket; see `SortedBuckets`.
    """
    sorted_buckets, order = torch.sort(buckets, dim=-1, stable=True)
    places = torch.arange(buckets.shape[-1], device=buckets.device).expand_as(order)
    inverse = torch.empty_like(order).scatter_(-1, order, places)
    begins = torch.ones_like(sorted_buckets, dtype=torch.bool)
    begins[..., 1:] = sorted_buckets[..., 1:] != sorted_buckets[..., :-1]
    start = torch.where(begins, places, 0).cummax(dim=-1).values
    return SortedBuckets(order, inverse, start)
