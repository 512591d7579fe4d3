"""The plan of a contraction: which order, how much at a time, by FLOPs, passes over memory and the memory there is.

For a weight `[p, q]`, n train samples of R positions, k directions, and mR' validation rows that these are made of:

    Gram         2·nR·mR'·(p + q)             no direction is formed; a pass over the pairs of positions
    direction    2·mR'·pq + k·2·nR·pq         the directions, then row dots
    tile stream  2·mR'·pq + 2·nR·pq + k·2·n·pq    the second term makes the weight gradient too; a pass over n·pq

Where the weight gradient is wanted, Gram and direction pay its 2·nR·pq beside this. A plan is a pure function of the
shape, the kind of device and the budget, and is made once for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

# FLOPs of a matrix product that take as long as what an entry of a tile costs beside its products: it is written, read
# for the dot products and added to a sum. On a CPU with wide vectors it takes 30 to 130, by the shape; at the lower end
# the order of fewer products is taken where two are as fast.
MEMORY_BOUND = 40
TILE_BYTES = {"cpu": 16 << 20}  # what stays in a cache; elsewhere:
_TILE_BYTES = 256 << 20
_PAIR_BYTES = 256 << 20
_ROWS = 256  # rows of a tile below which products lose speed
ORDERS = ("tile stream", "direction", "Gram")


class Shape(NamedTuple):
    """What is to be contracted: dot products of n samples with k directions, of one weight.

    Attributes:
        n: train samples.
        positions: positions of a train sample, R.
        p: rows of the weight.
        q: columns of the weight.
        k: directions.
        val_rows: validation rows m·R' that the directions are made of; 0 where they are given.
        given: whether the directions exist already.
        want_grad: whether the weight gradient is wanted too.
        itemsize: bytes of an entry.
        device: the kind of device, "cpu" or another.
    """

    n: int
    positions: int
    p: int
    q: int
    k: int
    val_rows: int
    given: bool
    want_grad: bool
    itemsize: int = 4
    device: str = "cpu"


@dataclass(frozen=True)
class Order:
    """A way to contract one weight, with what it costs: all products, the weight gradient's included.

    Attributes:
        name: "Gram", "direction" or "tile stream".
        flops: of matrix products.
        passes: entries that are passed over without a product to speak of.
        bytes: working memory, beside factors and results.
        samples: how many samples at a time.
        rows: how many rows of the weight at a time; for Gram: positions of a train sample.
    """

    name: str
    flops: int
    passes: int
    bytes: int
    samples: int
    rows: int

    @property
    def cost(self) -> int:
        """FLOPs, with passes over memory as the FLOPs that take as long."""
        return self.flops + MEMORY_BOUND * self.passes


def tile_bytes(device: str) -> int:
    """The working memory of a tile, where no budget is set."""
    return TILE_BYTES.get(device, _TILE_BYTES)


def at_a_time(n: int, p: int, q: int, others: int, limit: int) -> tuple[int, int]:
    """`(samples, rows)` of a tile of n samples and `others` directions, with at most `limit` entries `[., rows, q]`."""
    row = max(1, q)
    samples = max(1, min(n, limit // (min(p, _ROWS) * row) - others))
    rows = max(1, min(p, limit // ((samples + others) * row)))
    tiles = -(-p // rows)
    return samples, -(-p // tiles)  # tiles of one size


@lru_cache(maxsize=4096)
def orders(shape: Shape, budget: int | None = None) -> tuple[Order, ...]:
    """The orders that fit a budget, each with the largest chunks that do.

    Args:
        shape: what is to be contracted.
        budget: bytes of working memory; None for what suits the device.

    Returns:
        The orders, in the order of `ORDERS`.
    """
    n, positions, p, q, k, val_rows, given, want_grad, itemsize, device = shape
    weight = 2 * n * positions * p * q
    make = 0 if given else 2 * val_rows * p * q
    formed = 0 if given else k  # directions of which a tile is made
    found = []

    limit = min(tile_bytes(device), budget or tile_bytes(device)) // itemsize
    samples, rows = at_a_time(n, p, q, formed, limit)
    found.append(
        Order(
            "tile stream", make + weight + 2 * n * k * p * q, n * p * q,
            (samples + formed) * rows * q * itemsize, samples, rows,
        )
    )  # fmt: skip

    rows, samples = max(p, 1), n
    narrow = max(1, positions * min(p, q))  # of one sample
    if budget is not None:
        of_rows = budget // 2 if formed else 0
        rows = max(1, min(p, of_rows // (formed * q * itemsize))) if formed else rows
        samples = max(1, min(n, (budget - of_rows) // (2 * narrow * itemsize)))
    found.append(
        Order(
            "direction", make + k * weight + want_grad * weight, n * positions * min(p, q) * k,
            (formed * rows * q + 2 * samples * narrow) * itemsize, samples, rows,
        )
    )  # fmt: skip

    if not given:
        pair = 3 * val_rows * itemsize  # of one train position: two products and theirs
        limit = min(_PAIR_BYTES, budget or _PAIR_BYTES)
        samples = max(1, min(n, limit // max(1, positions * pair)))
        some = positions if samples > 1 else max(1, min(positions, limit // max(1, pair)))
        pairs = n * positions * val_rows
        found.append(
            Order(
                "Gram", 2 * pairs * (p + q) + want_grad * weight, pairs, samples * some * pair, samples, some
            )
        )  # fmt: skip
    return tuple(order for order in found if budget is None or order.bytes <= budget)


_forced: list[str] = []


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Take one order wherever it is possible: for tests and measurements of what was not chosen."""
    if name not in ORDERS:
        raise ValueError(f"order {name!r}: expected {', '.join(map(repr, ORDERS))}.")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def best_order(shape: Shape, budget: int | None = None, *, tiles: bool = True) -> Order:
    """The cheapest order that fits the budget.

    Args:
        shape: what is to be contracted.
        budget: bytes of working memory; None for what suits the device.
        tiles: whether the tile stream is possible.

    Returns:
        The order.

    Raises:
        ValueError: where the budget is too small for any.
    """
    possible = orders(shape, budget) if tiles else tuple(o for o in orders(shape, budget) if o.name != "tile stream")
    if _forced:
        possible = tuple(o for o in possible if o.name == _forced[-1]) or possible
    if not possible:
        least = min((o for o in orders(shape) if tiles or o.name != "tile stream"), key=lambda o: o.bytes)
        raise ValueError(
            f"memory={budget}: too small to contract a weight [{shape.p}, {shape.q}] with {shape.k} directions, even "
            f"in the smallest pieces ({(1 + shape.k) * shape.q * shape.itemsize} bytes). Without a budget the leanest "
            f"order ({least.name}) takes {least.bytes}."
        )
    return min(possible, key=lambda order: order.cost)


class Budget:
    """The working memory that contractions may take at a time, as the user gave it: bytes, or a share of a plain step.

    Attributes:
        asked: bytes (int), a share of what a plain step takes (float), or None.
        bytes: what it comes to, once the sites are known; None for what suits the device.
    """

    def __init__(self, asked: int | float | None = None) -> None:
        if asked is not None and (isinstance(asked, bool) or not isinstance(asked, int | float) or not asked > 0):
            raise ValueError(
                f"memory={asked!r}: expected bytes (an int above 0), or a share of what a plain step takes (a float)."
            )
        self.asked = asked
        self.bytes = asked if isinstance(asked, int) else None

    def resolve(self, plain_step: Callable[[], int]) -> None:
        """Make a share bytes.

        Args:
            plain_step: gives the bytes that a plain step takes: gradients, and results of operations that are kept.
        """
        if isinstance(self.asked, float):
            self.bytes = int(self.asked * plain_step())
