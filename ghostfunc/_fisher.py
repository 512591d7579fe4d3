"""A damped inverse of a block-diagonal Fisher matrix, in the eigenbasis of each block: what K-FAC and EK-FAC come to.

    F_b vec(V) = vec(U_L (s * (U_L^T V U_R)) U_R^T)            U_L, U_R orthogonal, s >= 0: [p, q]
    P_b V      = U_L ((U_L^T V U_R) / (s + lambda_b)) U_R^T    (F_b + lambda_b I)^-1: linear, symmetric, PSD

K-FAC and EK-FAC differ in s alone; a full Fisher matrix is a block with q = 1, and a diagonal one has no U_L either.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ghostfunc._parquet import write_atomically
from ghostfunc._sharded import is_sharded

_FORMAT = 1
_PLAN = "preconditioner.json"
_TENSORS = "preconditioner.safetensors"


@dataclass(frozen=True, eq=False)
class Block:
    """One block of the Fisher matrix: of all entries of a parameter, or of some, seen as a matrix `[p, q]`.

    Attributes:
        values: the eigenvalues s, `[p, q]`.
        damping: lambda, what is added to them.
        left: eigenvectors U_L as columns, `[p, p]`; None for the identity.
        right: eigenvectors U_R as columns, `[q, q]`; None for the identity.
        entries: where the matrix's entries are in the flat parameter, `[p * q]`; None for all of them in order.
    """

    values: Float[Tensor, "p q"]
    damping: float
    left: Float[Tensor, "p p"] | None = None
    right: Float[Tensor, "q q"] | None = None
    entries: Int[Tensor, " pq"] | None = None

    def solve(self, flat: Float[Tensor, " numel"]) -> Float[Tensor, " pq"]:
        """The block's part of P V: of the entries that it is about, from the whole flat parameter.

        A block without curvature and without damping gives zero, the pseudo-inverse.
        """
        tensors = (self.values, self.left, self.right)
        values, left, right = (None if t is None else t.to(flat) for t in tensors)
        assert values is not None
        matrix = (flat if self.entries is None else flat[self.entries.to(flat.device)]).view(values.shape)
        total = values + self.damping
        inverse = torch.where(total > 0, 1 / total.clamp(min=torch.finfo(total.dtype).tiny), 0)
        rotated = _right(_left(matrix, None if left is None else left.t()), right) * inverse
        return _right(_left(rotated, left), None if right is None else right.t()).reshape(-1)


def _left(matrix: Tensor, basis: Tensor | None) -> Tensor:
    return matrix if basis is None else basis @ matrix


def _right(matrix: Tensor, basis: Tensor | None) -> Tensor:
    return matrix if basis is None else matrix @ basis


class FisherPreconditioner:
    """The inverse (F + lambda I)^-1 of a block-diagonal Fisher matrix, as a function of gradient dicts.

    What `kfac` and `ekfac` return, for `precondition=`. Linear, symmetric and positive semi-definite; on another device
    or in another dtype it computes there, in the wider of the two dtypes.

    Attributes:
        kind: "kfac" or "ekfac".
        blocks: the blocks of each parameter, which cover all of its entries.
        shapes: of the parameters.
        how: for each parameter, what its block of the Fisher matrix is made of.
        left_out: parameters that `layers` left out; a direction's entries for these are not in the result.
        samples: how many samples the Fisher matrix is the mean over.
        damping: as given.
        relative: whether the damping is a multiple of each parameter's mean eigenvalue.

    Example:
        >>> import tempfile, torch, ghostfunc as gf
        >>> model_fn, params = gf.functionalize(torch.nn.Linear(4, 3), gf.classification_loss)
        >>> batches = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(2)]
        >>> preconditioner = gf.kfac(model_fn, params, batches)
        >>> preconditioner
        FisherPreconditioner(kfac, 16 samples, damping 0.1 x each parameter's mean eigenvalue)
          Kronecker 3 x 4: weight
          full Fisher 3 x 3: bias
        >>> folder = tempfile.mkdtemp()
        >>> preconditioner.save(folder)
        >>> again = gf.FisherPreconditioner.load(folder)
        >>> torch.allclose(again(params)["weight"], preconditioner(params)["weight"])
        True
    """

    def __init__(
        self,
        kind: str,
        blocks: Mapping[str, tuple[Block, ...]],
        shapes: Mapping[str, tuple[int, ...]],
        how: Mapping[str, str],
        *,
        left_out: tuple[str, ...],
        samples: int,
        damping: float,
        relative: bool,
    ) -> None:
        self.kind = kind
        self.blocks = dict(blocks)
        self.shapes = dict(shapes)
        self.how = dict(how)
        self.left_out = left_out
        self.samples = samples
        self.damping = damping
        self.relative = relative

    def __call__(self, direction: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """P V, parameter by parameter.

        Args:
            direction: V, tensors by parameter name: of all parameters, or of some, which are preconditioned apart.

        Returns:
            P V for the names of the direction, without those in `left_out`.

        Raises:
            ValueError: if a name is unknown or a shape is not the parameter's.
            NotImplementedError: if a tensor is sharded.
        """
        unknown = sorted(set(direction) - set(self.blocks) - set(self.left_out))
        if unknown:
            raise ValueError(
                f"direction: {', '.join(unknown)} are not parameters of this preconditioner; these are "
                f"{', '.join(self.blocks)}."
            )
        return {name: self._solve(name, tensor) for name, tensor in direction.items() if name in self.blocks}

    def _solve(self, name: str, direction: Tensor) -> Tensor:
        if is_sharded(direction):
            raise NotImplementedError(
                f"direction[{name!r}] is sharded, and eigenvectors turn whole weights: {self.kind} is for unsharded "
                "parameters. Use another precondition (gf.diagonal)."
            )
        blocks, shape = self.blocks[name], self.shapes[name]
        if tuple(direction.shape) != shape:
            raise ValueError(
                f"direction[{name!r}] has shape {tuple(direction.shape)}; the preconditioner was made for {shape}."
            )
        flat = direction.reshape(-1).to(torch.promote_types(direction.dtype, blocks[0].values.dtype))
        whole = len(blocks) == 1 and blocks[0].entries is None
        if whole:
            return blocks[0].solve(flat).view(shape)
        entries = torch.cat([b.entries for b in blocks if b.entries is not None]).to(flat.device)
        solved = torch.cat([block.solve(flat) for block in blocks])
        return torch.zeros_like(flat).index_copy(0, entries, solved).view(shape)

    def __repr__(self) -> str:
        by_how: dict[str, list[str]] = {}
        for name, how in self.how.items():
            by_how.setdefault(how, []).append(name)
        damping = f"{self.damping:g}" + (" x each parameter's mean eigenvalue" if self.relative else "")
        lines = [f"FisherPreconditioner({self.kind}, {self.samples} samples, damping {damping})"]
        lines += [f"  {how}: {', '.join(names)}" for how, names in by_how.items()]
        if self.left_out:
            lines.append(f"  left out by layers, not in the result: {', '.join(self.left_out)}")
        return "\n".join(lines)

    def save(self, folder: str | os.PathLike) -> None:
        """Write `preconditioner.safetensors` and `preconditioner.json` into a folder, which is made if it is not there.

        Args:
            folder: where to; files of these names are replaced.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            key: tensor.detach().cpu().contiguous().clone()  # safetensors refuses tensors that share memory
            for index, blocks in enumerate(self.blocks.values())
            for number, block in enumerate(blocks)
            for key, tensor in _tensors(block, f"{index}.{number}").items()
        }
        data = safetensors.torch.save(tensors)
        plan = {
            "kind": self.kind,
            "samples": self.samples,
            "damping": self.damping,
            "relative": self.relative,
            "left_out": list(self.left_out),
            "parameters": [
                {
                    "name": name,
                    "shape": self.shapes[name],
                    "how": self.how[name],
                    "damping": [b.damping for b in blocks],
                }
                for name, blocks in self.blocks.items()
            ],
        }
        text = json.dumps({"format": _FORMAT, "plan": plan, "plan_sha256": _digest(plan), "sha256": _digest(data)})
        write_atomically(folder / _TENSORS, lambda file: file.write(data))
        write_atomically(folder / _PLAN, lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, folder: str | os.PathLike, device: torch.device | str = "cpu") -> FisherPreconditioner:
        """Read what `save` wrote; nothing is unpickled.

        Args:
            folder: the folder.
            device: where its tensors go.

        Returns:
            The same preconditioner.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if a file is damaged, or is none of this kind; the message names it.
        """
        path, data_path = Path(folder) / _PLAN, Path(folder) / _TENSORS
        remedy = "Make the preconditioner again, and save it."
        text, data = path.read_bytes(), data_path.read_bytes()
        try:
            stored = json.loads(text)
            version, plan, plan_digest, digest = (stored[key] for key in ("format", "plan", "plan_sha256", "sha256"))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}). {remedy}") from error
        if version != _FORMAT:
            raise ValueError(f"{path} has format {version!r}; this version reads {_FORMAT}. {remedy}")
        if _digest(plan) != plan_digest:
            raise ValueError(f"{path} is damaged (it was changed after it was saved). {remedy}")
        if _digest(data) != digest:
            raise ValueError(f"{data_path} is damaged (it is not the file that {path.name} was saved with). {remedy}")
        return cls._of(plan, safetensors.torch.load(data), device)

    @classmethod
    def _of(cls, plan: dict[str, Any], tensors: dict[str, Tensor], device: torch.device | str) -> FisherPreconditioner:
        blocks: dict[str, tuple[Block, ...]] = {}
        shapes = {entry["name"]: tuple(entry["shape"]) for entry in plan["parameters"]}
        for index, entry in enumerate(plan["parameters"]):
            of_name = []
            for number, damping in enumerate(entry["damping"]):
                found = {
                    field: tensors[key].to(device)
                    for field in ("values", "left", "right", "entries")
                    if (key := f"{index}.{number}.{field}") in tensors
                }
                of_name.append(Block(damping=float(damping), **found))
            blocks[entry["name"]] = tuple(of_name)
        return cls(
            plan["kind"],
            blocks,
            shapes,
            {entry["name"]: entry["how"] for entry in plan["parameters"]},
            left_out=tuple(plan["left_out"]),
            samples=plan["samples"],
            damping=plan["damping"],
            relative=plan["relative"],
        )


def _digest(content: Any) -> str:
    """Of bytes, or of what JSON holds."""
    data = content if isinstance(content, bytes) else json.dumps(content, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()


def _tensors(block: Block, prefix: str) -> dict[str, Tensor]:
    fields = {"values": block.values, "left": block.left, "right": block.right, "entries": block.entries}
    return {f"{prefix}.{field}": tensor for field, tensor in fields.items() if tensor is not None}


def damped(blocks: list[Block], numel: int, damping: float, *, relative: bool) -> tuple[Block, ...]:
    """The blocks of a parameter with its damping: lambda = damping, or damping x the mean of all its eigenvalues."""
    mean = sum(float(block.values.sum()) for block in blocks) / numel
    return tuple(replace(block, damping=damping * mean if relative else damping) for block in blocks)
