"""The random number generators of a process: torch's on the CPU and on its accelerator, Python's and NumPy's."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def generator_states(device: torch.device) -> dict[str, Any]:
    """The states of all generators, as numbers, text and tensors."""
    version, numbers, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state(),
        "accelerator": None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device),
        "device": device.type,
        "python": [version, torch.tensor(numbers), gauss],
        "numpy": [
            numpy_state["bit_generator"],
            torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            int(numpy_state["state"]["pos"]),
            int(numpy_state["has_gauss"]),
            float(numpy_state["gauss"]),
        ],
    }


def set_generator_states(states: dict[str, Any], device: torch.device) -> None:
    """Put all generators where they were; an accelerator's only if it is of the same kind."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    name, key, pos, has_gauss, cached = states["numpy"]
    np.random.set_state((name, key.numpy().astype(np.uint32), pos, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if states["accelerator"] is not None and states["device"] == device.type:
        torch.get_device_module(device).set_rng_state(states["accelerator"], device)


def digest_of(states: dict[str, Any]) -> str:
    """A sha256 that equal states share."""
    digest = hashlib.sha256()
    for value in (states["torch"], states["accelerator"], *states["python"], *states["numpy"]):
        digest.update(value.cpu().numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode())
    return digest.hexdigest()


def seed_generators(text: str) -> None:
    """Seed all generators with a number that the text decides."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
