"""Kronecker projections: two small matrices for each parameter, in place of a large one for its gradient.

    proj(G) = P_in^T G P_out,    G = A^T (grad-outputs) as [d_in, d_out],    E <proj(G), proj(H)> = <G, H>

The inner product is kept in expectation where E[P P^T] is the identity, as it is for every kind of random matrix here.
(The two-sided form is LoGra's, Choe et al., 2024, arXiv 2405.13954, section 3.)
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ghostfunc._blocks import Blocks
from ghostfunc._parquet import write_atomically
from ghostfunc._sharded import gathered

_FORMAT = 1


class Part(NamedTuple):
    """The share of a projection that one parameter has.

    Attributes:
        shape: the parameter's.
        blocks: the parameter as blocks `[d_in, d_out]`.
        p_in: `[d_in, k_in]`, the same for each block.
        p_out: `[d_out, k_out]`, the same for each block.
        clipped: whether a block has fewer entries than the rank that was asked for.
    """

    shape: tuple[int, ...]
    blocks: Blocks
    p_in: Tensor
    p_out: Tensor
    clipped: bool

    @property
    def size(self) -> int:
        """Numbers of one block's projection, k_in * k_out."""
        return self.p_in.shape[1] * self.p_out.shape[1]


@dataclass(frozen=True, eq=False, repr=False)
class KroneckerProjection:
    """A projection of per-sample gradients; print it.

    Attributes:
        parts: the parameters that it is of, by name, in the order of their slices.
        kind: of its matrices.
        seed: of its matrices.
        rank: about how many numbers a block was to become.
        min_rank: the least rank of a side that was asked for.
    """

    parts: dict[str, Part]
    kind: str
    seed: int
    rank: int
    min_rank: int

    @cached_property
    def slices(self) -> dict[str, slice]:
        """The columns of each parameter, block after block, each block row-major over `[k_in, k_out]`."""
        found, start = {}, 0
        for name, part in self.parts.items():
            stop = start + part.blocks.count * part.size
            found[name], start = slice(start, stop), stop
        return found

    @property
    def dim(self) -> int:
        """How many numbers a sample's gradient becomes, k."""
        return sum(part.blocks.count * part.size for part in self.parts.values())

    @property
    def clipped(self) -> tuple[str, ...]:
        """The parameters that are too small for the rank that was asked for."""
        return tuple(name for name, part in self.parts.items() if part.clipped)

    def matrices(self, name: str) -> tuple[Tensor, Tensor]:
        """The matrices of a parameter: `(P_in[d_in, k_in], P_out[d_out, k_out])`, `[[1.]]` for a side of size 1.

        Args:
            name: the parameter's.

        Returns:
            Both matrices, on the parameters' device. A vector (a bias, a norm's scale) has `P_out = [[1.]]`.

        Raises:
            KeyError: if the projection is not of this parameter.
        """
        if name not in self.parts:
            raise KeyError(f"{name!r} is not in this projection; it is of {', '.join(self.parts)}.")
        return self.parts[name].p_in, self.parts[name].p_out

    def project(self, gradient: Mapping[str, Tensor]) -> Float[Tensor, " k"]:
        """The projection of one gradient that is at hand, such as a mean or a preconditioned one.

        Args:
            gradient: by name, each of its parameter's shape; names that the projection is not of are left out. Sharded
                ones are gathered one by one: all their ranks make the call.

        Returns:
            `[k]`, in the columns of `slices`.

        Raises:
            ValueError: if a parameter of the projection is missing, or has another shape.
        """
        columns = []
        for name, part in self.parts.items():
            if name not in gradient:
                raise ValueError(
                    f"the gradient has no {name}, which the projection is of; it has {', '.join(gradient)}."
                )
            if tuple(gradient[name].shape) != part.shape:
                raise ValueError(
                    f"{name}: the gradient has shape {tuple(gradient[name].shape)}, the projection is of {part.shape}."
                )
            whole = gathered(gradient[name]).detach().to(part.p_in)
            blocks = part.blocks.of(whole.unsqueeze(0))  # [1, count, d_in, d_out]
            columns.append((part.p_in.t() @ blocks @ part.p_out).flatten())
        return torch.cat(columns)

    def adjoint(self, projected: Float[Tensor, " k"]) -> dict[str, Tensor]:
        """The direction V whose inner product with a gradient G is that of projections: <V, G> = <projected, proj(G)>.

        V = P_in Y P_out^T of each block Y of what is given. It is as large as the parameters that the projection is of.

        Args:
            projected: `[k]`: a row of an index, or a query, preconditioned or not.

        Returns:
            Each parameter's part of V, of its shape.

        Raises:
            ValueError: if it has another length than the projection.
        """
        if projected.shape != (self.dim,):
            raise ValueError(f"expected [{self.dim}], as this projection gives, not {list(projected.shape)}.")
        direction = {}
        for (name, part), columns in zip(self.parts.items(), self.slices.values(), strict=True):
            k_in, k_out = part.p_in.shape[1], part.p_out.shape[1]
            small = projected[columns].detach().to(part.p_in).view(1, part.blocks.count, k_in, k_out)
            direction[name] = part.blocks.back(part.p_in @ small @ part.p_out.t()).view(part.shape)
        return direction

    def describe(self) -> dict[str, Any]:
        """What it is, as JSON can hold it: kind, seed, ranks, and each parameter's shape, k_in, k_out and columns."""
        return {
            "kind": self.kind,
            "seed": self.seed,
            "rank": self.rank,
            "min_rank": self.min_rank,
            "dim": self.dim,
            "parameters": {
                name: {
                    "shape": list(part.shape),
                    "blocks": part.blocks.count,
                    "d_in": part.blocks.d_in,
                    "d_out": part.blocks.d_out,
                    "k_in": part.p_in.shape[1],
                    "k_out": part.p_out.shape[1],
                    "columns": [self.slices[name].start, self.slices[name].stop],
                    "clipped": part.clipped,
                }
                for name, part in self.parts.items()
            },
        }

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 of all that decides its numbers: the same for the same projection, on every machine."""
        digest = hashlib.sha256(json.dumps(self._plan(), sort_keys=True).encode())
        for tensor in self._tensors().values():
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: str | os.PathLike) -> None:
        """Write it to a safetensors file, whole or not at all.

        Args:
            path: the file.
        """
        import safetensors.torch

        metadata = {"ghostfunc": json.dumps({"format": _FORMAT, "fingerprint": self.fingerprint, **self._plan()})}
        data = safetensors.torch.save(self._tensors(), metadata)
        write_atomically(Path(path), lambda file: file.write(data))

    @classmethod
    def load(cls, path: str | os.PathLike, device: torch.device | str = "cpu") -> KroneckerProjection:
        """Read what `save` wrote; nothing is unpickled.

        Args:
            path: the file.
            device: where its matrices go.

        Returns:
            The same projection.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged, or none of a projection; the message names it.
        """
        import safetensors

        remedy = "Make the projection again with kronecker_projection, and save it."
        try:
            with safetensors.safe_open(path, "pt") as file:
                plan = json.loads((file.metadata() or {})["ghostfunc"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
            if plan["format"] != _FORMAT:
                raise ValueError(f"format {plan['format']!r}, where this version reads {_FORMAT}")
            parts = {}
            for index, entry in enumerate(plan["parameters"]):
                blocks = Blocks(tuple(entry["split"]), tuple(entry["dims"]), *entry["sizes"])
                sides = tensors[f"{index}.in"], tensors[f"{index}.out"]
                parts[entry["name"]] = Part(tuple(entry["shape"]), blocks, *sides, clipped=entry["clipped"])
            found = cls(parts, plan["kind"], plan["seed"], plan["rank"], plan["min_rank"])
            if found.fingerprint != plan["fingerprint"]:
                raise ValueError("its matrices are not those that were saved")
        except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise ValueError(
                f"{path} is damaged or no projection ({type(error).__name__}: {error}). {remedy}"
            ) from error
        return found.to(device)

    def to(self, device: torch.device | str) -> KroneckerProjection:
        """The same projection with its matrices on a device.

        Args:
            device: where they go.

        Returns:
            A projection.
        """
        moved = {
            name: part._replace(p_in=part.p_in.to(device), p_out=part.p_out.to(device))
            for name, part in self.parts.items()
        }
        return KroneckerProjection(moved, self.kind, self.seed, self.rank, self.min_rank)

    def _plan(self) -> dict[str, Any]:
        parameters = [
            {
                "name": name,
                "shape": list(part.shape),
                "split": list(part.blocks.split),
                "dims": list(part.blocks.dims),
                "sizes": [part.blocks.count, part.blocks.d_in, part.blocks.d_out],
                "clipped": part.clipped,
            }
            for name, part in self.parts.items()
        ]
        plan = {"kind": self.kind, "seed": self.seed, "rank": self.rank, "min_rank": self.min_rank}
        return {**plan, "parameters": parameters}

    def _tensors(self) -> dict[str, Tensor]:
        sides = [(f"{index}.{side}", getattr(part, f"p_{side}")) for index, part in enumerate(self.parts.values())
                 for side in ("in", "out")]  # fmt: skip
        return {key: tensor.detach().cpu().contiguous() for key, tensor in sides}

    def __str__(self) -> str:
        rows = [("parameter", "shape", "blocks", "d_in x d_out", "k_in x k_out", "")]
        for name, part in self.parts.items():
            note = "clipped: as many numbers as a block has" if part.clipped else ""
            rows.append(
                (
                    name,
                    "x".join(map(str, part.shape)) or "scalar",
                    str(part.blocks.count),
                    f"{part.blocks.d_in} x {part.blocks.d_out}",
                    f"{part.p_in.shape[1]} x {part.p_out.shape[1]}",
                    note,
                )
            )
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        small = f"; {len(self.clipped)} clipped to small layers" if self.clipped else ""
        head = f"{len(self.parts)} parameters to {self.dim} numbers, {self.kind} matrices of seed {self.seed}{small}"
        return "\n".join([head, *lines])

    __repr__ = __str__
