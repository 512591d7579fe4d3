"""The models and batches that the benchmarks measure, as descriptions that fit in a line of JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import vs_vmap
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from vs_vmap import Workload

import ghostfunc as gf

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A model and the sizes of its two batches.

    Attributes:
        model: "gpt2", "mlp" or "convnet".
        n: train samples.
        m: validation samples.
        positions: tokens of a sample; 0 for images.
        layers: of "gpt2".
        width: of a layer; channels of the first convolution.
        vocabulary: of "gpt2".
        tied: whether the head of "gpt2" is its embedding.
    """

    model: str
    n: int
    m: int
    positions: int = 0
    layers: int = 0
    width: int = 0
    vocabulary: int = 0
    tied: bool = False

    @property
    def architecture(self) -> str:
        """For readers."""
        if self.model == "gpt2":
            tied = "tied" if self.tied else "untied"
            return f"GPT-2 {self.layers} x {self.width}, vocabulary {self.vocabulary}, {tied}"
        if self.model == "mlp":
            return f"MLP 784-{self.width}-{self.width}-{self.width}-10"
        c = self.width
        return f"3 convolutions 3-{c}-{2 * c}-{4 * c}, images 32 x 32"

    @property
    def batch(self) -> str:
        """For readers."""
        return f"B={self.n}, Bv={self.m}" + (f", T={self.positions}" if self.positions else "")

    @property
    def name(self) -> str:
        """The key of the results."""
        return f"{self.architecture}; {self.batch}"

    def tiny(self) -> "Case":
        """The same kind of case in milliseconds."""
        of = {"gpt2": {"layers": 2, "vocabulary": 211}}.get(self.model, {})
        few = {"n": min(self.n, 4), "m": min(self.m, 2), "positions": min(self.positions, 8)}
        return Case(**{**asdict(self), **few, **of, "width": 16})

    def build(self) -> Workload:
        """Weights and batches at random, always the same."""
        torch.manual_seed(0)
        if self.model == "gpt2":
            return vs_vmap.gpt2(
                CPU, layers=self.layers, heads=max(1, self.width // 64), width=self.width, vocabulary=self.vocabulary,
                positions=self.positions, tied=self.tied, samples=(self.n, self.m),
            )  # fmt: skip
        samples = (self.n, self.m)
        return vs_vmap.mlp(CPU, samples=samples, width=self.width) if self.model == "mlp" else convnet(self)


def convnet(case: Case) -> Workload:
    """Convolutions without norms, for peers know few of these."""
    c = case.width
    module = nn.Sequential(
        nn.Conv2d(3, c, 3, padding=1), nn.ReLU(),
        nn.Conv2d(c, 2 * c, 3, padding=1, stride=2), nn.ReLU(),
        nn.Conv2d(2 * c, 4 * c, 3, padding=1, stride=2), nn.ReLU(),
        nn.AvgPool2d(8), nn.Flatten(), nn.Linear(4 * c, 10),
    )  # fmt: skip
    model_fn, params = gf.functionalize(module, gf.classification_loss)
    train, val = ((torch.randn(k, 3, 32, 32), torch.randint(10, (k,))) for k in (case.n, case.m))
    return Workload(model_fn, params, train, val, {"model": case.architecture, "B": case.n, "Bv": case.m}, module)


def of_json(case: Mapping[str, Any]) -> Case:
    return Case(**case)


def both(work: Workload) -> Any:
    """The concatenated batch."""
    return pytree.tree_map(lambda a, b: torch.cat([a, b]), work.train, work.val)


def in_double(work: Workload) -> Workload:
    def convert(t: Tensor) -> Tensor:
        return t.double() if t.is_floating_point() else t

    batches = (pytree.tree_map(convert, batch) for batch in (work.train, work.val))
    params = {name: p.double() for name, p in work.params.items()}
    return work._replace(params=params, train=next(batches), val=next(batches))
