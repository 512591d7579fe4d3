"""What `run.py` measures, part by part, and what it claims: tables to read and to change, without code that runs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from workloads import Case

# --- cases ------------------------------------------------------------------------------------------------------------

GPT2_SMALL = Case("gpt2", 4, 1, 256, layers=12, width=768, vocabulary=50257, tied=True)
# At full width; two layers, and a vocabulary that leaves the head the share of the products that it has in GPT-2 small.
PAPER = Case("gpt2", 16, 1, 512, layers=2, width=768, vocabulary=8192, tied=True)
NANO = Case("gpt2", 8, 1, 64, layers=4, width=256, vocabulary=8192, tied=True)
MLP = Case("mlp", 64, 16, width=1024)
CONVNET = Case("convnet", 32, 8, width=32)


def gpt2_small(n: int, m: int, positions: int, *, tied: bool = True) -> Case:
    return replace(GPT2_SMALL, n=n, m=m, positions=positions, tied=tied)


SHAPES = {(4, 1, 256): 1.05, (2, 1, 1024): 1.05, (4, 4, 256): 1.05, (16, 1, 64): 1.12}  # (B, Bv, T): target of dots
LENGTHS = (64, 128, 256, 512, 1024)
POWERS = (1, 2, 4, 8, 16, 32, 64)


# --- parts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Cases, each with the methods that take turns on it.

    Attributes:
        rounds: of turns.
        cases: `(case, methods)`.
    """

    rounds: int
    cases: tuple[tuple[Case, tuple[str, ...]], ...]


def sweep(cases: list[Case]) -> Part:
    return Part(5, tuple((case, ("plain", "both", "dots", "vmap")) for case in cases))


DOTS = tuple(
    (gpt2_small(*shape), ("both", "dots", "matrix") if shape == (4, 4, 256) else ("both", "dots")) for shape in SHAPES
)
QUANTITIES = ("plain", "val", "along", "norms", "clipped", "projection")
COMPARED = ("plain", "both", "dots", "vmap", "direct", "opacus", "backpack", "dattri")
PARTS = {
    "claims-dots": Part(5, DOTS),
    "claims-quantities": Part(5, ((GPT2_SMALL, QUANTITIES),)),
    "claims-paper": Part(3, ((PAPER, ("plain", "dots", "second", "direct")),)),
    "compare": Part(
        3, tuple((case, COMPARED) for case in (MLP, CONVNET, NANO, gpt2_small(4, 1, 256, tied=False)))
    ),
    "claims-untied": Part(3, tuple((replace(case, tied=False), ("both", "dots")) for case, _ in DOTS)),
    "sweep-batch": sweep([replace(case, n=n, m=1) for case in (NANO, MLP, CONVNET) for n in POWERS]),
    "sweep-val": sweep([replace(case, m=m) for case in (NANO, MLP) for m in POWERS[:5]]),
    "sweep-length": sweep([replace(NANO, n=4, positions=positions) for positions in LENGTHS]),
    "sweep-width": sweep(
        [replace(NANO, width=width, layers=2, vocabulary=2048) for width in (64, 128, 256, 512, 1024)]
        + [replace(MLP, width=width) for width in (64, 256, 1024, 2048)]
    ),
}  # fmt: skip
LIMITED, LIMITED_METHODS, ALLOWED_BYTES = gpt2_small(32, 1, 64), ("dots", "vmap"), 6 * 2**30
SHORT = {
    "claims-dots": Part(3, DOTS[:1]),
    "claims-quantities": Part(3, ((GPT2_SMALL, QUANTITIES),)),
    "compare": Part(3, tuple((case, COMPARED[:6]) for case in (MLP, CONVNET, NANO))),
}
SHORT_LIMITED = "memory-limit", "planner"


# --- claims -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """A ratio of sums of steps' times, or of peaks, and what it may be at most.

    Attributes:
        label: what is claimed.
        part: where it is measured.
        case: on what.
        target: the ratio, at most.
        above: the steps in the numerator, and how many of each.
        below: those in the denominator.
        of: "times" or "peaks".
    """

    label: str
    part: str
    case: Case
    target: float
    above: Mapping[str, int]
    below: Mapping[str, int]
    of: str = "times"


def claims() -> list[Claim]:
    """Every claim, in the order of the page."""
    one = {"dots": 1}, {"both": 1}
    label = "dots with gradients / plain step on the concatenated batch"
    found = [
        Claim(label, part, gpt2_small(*shape, tied=tied), target, *one)
        for part, tied in (("claims-dots", True), ("claims-untied", False))
        for shape, target in SHAPES.items()
    ]
    label = "one direction over eight micro-batches / eight plain steps and the plain val step"
    found.append(Claim(label, "claims-quantities", GPT2_SMALL, 1.06, {"val": 1, "along": 8}, {"val": 1, "plain": 8}))
    wide = gpt2_small(4, 4, 256)
    found.append(
        Claim("full matrix / dots, both with gradients", "claims-dots", wide, 1.05, {"matrix": 1}, {"dots": 1})
    )
    for label, method, target in (
        ("projections, rank 256, attention and MLP / plain step", "projection", 0.72),
        ("norms with gradients / plain step", "norms", 1.08),
        ("clipped gradients / plain step", "clipped", 1.45),
    ):
        found.append(Claim(label, "claims-quantities", GPT2_SMALL, target, {method: 1}, {"plain": 1}))
    label = "the paper's shape in kind: dots with gradients / plain step on the train batch alone"
    found.append(Claim(label, "claims-paper", PAPER, 1.09, {"dots": 1}, {"plain": 1}))
    label = "peak memory: dots with gradients / plain step on the concatenated batch"
    found += [
        Claim(label, part, gpt2_small(*shape, tied=tied), 1.15, *one, of="peaks")
        for part, tied in (("claims-dots", True), ("claims-untied", False))
        for shape in SHAPES
    ]
    return found
