"""The engine under the seeds' entry: set up from a run's configuration, and harmless under plain training."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ghostfunc._engine import EngineOutput, GradDotProdEngine
from ghostfunc._engine_batch import require_one_of, tensors_by_name
from ghostfunc._functionalize import LossFn
from ghostfunc._losses import causal_lm_loss
from ghostfunc.dotlog import DotLog

_METHODS = ("GradDotProd", "Regular")


class GhostEngineManager(GradDotProdEngine):
    """The engine under the seeds' entry: set up from a run's configuration, and harmless under `method="Regular"`.

    Args:
        config: an `argparse.Namespace`, a dataclass, a mapping or any object with attributes. Read, where there:
            `method` ("GradDotProd", the default, or "Regular"), `dot_prod_save_interval` (10), `result_dir` (the log
            goes to `<result_dir>/dot_log`; without it nothing is stored), `out`, `layers`, `schedule` and `order`. Its
            values are stored with the log, except those that JSON cannot hold.
        model: the module.
        optimizer: its optimizer.
        ddp_info: a mapping; where `master_process` is false, this process writes no log.
        val_data: `(X_val, Y_val)`.
        loss: as in `GradDotProdEngine`.
        call: as in `GradDotProdEngine`.
        precondition: as in `GradDotProdEngine`.

    Raises:
        ValueError: for an unknown method, or no `val_data` under GradDotProd.
        NotImplementedError: for GradDotProd in a process group of several ranks.

    Under `"Regular"`, `ghost_engine(X, Y)` is a plain forward with the same loss, and every other verb does nothing.

    Example:
        >>> import torch, ghostfunc as gf
        >>> from ghostfunc.engine import GhostEngineManager
        >>> model, X, Y = torch.nn.Linear(4, 3), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> ghost_engine = GhostEngineManager({"method": "GradDotProd"}, model, optimizer, val_data=(X[:2], Y[:2]),
        ...                                   loss=gf.classification_loss)
        >>> ghost_engine.attach_train_batch(X, Y, 0, range(5))
        >>> X_forward, Y_forward = ghost_engine.prepare_forward_input(X, Y)
        >>> ghost_engine(X_forward, Y_forward).loss.backward()
        >>> ghost_engine.prepare_gradients()
        >>> optimizer.step()
        >>> ghost_engine.dots.shape
        torch.Size([5])
    """

    def __init__(
        self,
        config: Any,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        ddp_info: Mapping[str, Any] | None = None,
        val_data: Any = None,
        *,
        loss: LossFn = causal_lm_loss,
        call: Callable[[nn.Module, Any], Any] | None = None,
        precondition: Callable[..., dict[str, Tensor]] | None = None,
    ) -> None:
        settings = _as_dict(config)
        self.method: str = settings.get("method", "GradDotProd")
        require_one_of("method", self.method, _METHODS)
        self.is_regular = self.method == "Regular"
        if not self.is_regular and val_data is None:
            raise ValueError("GradDotProd needs val_data=(X_val, Y_val), the batch that the dots refer to.")
        if not self.is_regular and world_size() > 1:
            raise NotImplementedError(
                f"GradDotProd runs in one process; this one is of {world_size()}, and gradients would not be reduced "
                'over them. Start one process, or use method="Regular".'
            )
        super().__init__(
            model,
            None if self.is_regular else val_data,
            loss=loss,
            call=call,
            optimizer=optimizer,
            save_interval=settings.get("dot_prod_save_interval", 10),
            out=settings.get("out", "train"),
            layers=settings.get("layers", ""),
            schedule=settings.get("schedule", "auto"),
            precondition=precondition,
            order=1 if self.is_regular else settings.get("order", 1),
        )
        result_dir = settings.get("result_dir")
        if not self.is_regular and result_dir is not None and (ddp_info or {}).get("master_process", True):
            storable = {key: value for key, value in settings.items() if _is_storable(value)}
            self.log = DotLog(Path(result_dir) / "dot_log", config=storable, val_batch=tensors_by_name(self._val_batch))

    def __call__(self, X: Any = None, Y: Any = None, /, **inputs: Any) -> EngineOutput:
        """Under "Regular", run a plain forward with loss; otherwise as `GradDotProdEngine.__call__`."""
        if not self.is_regular:
            return super().__call__(X, Y, **inputs)
        batch = self._batch_of_call(X, Y, inputs)
        losses = self.loss_fn(self.call(self.module, batch), batch)  # [n]
        self.losses = losses.detach()
        return EngineOutput(losses.mean(), self.losses, None, None)

    def prepare_gradients(self) -> None:
        """Under "Regular", do nothing; otherwise as `GradDotProdEngine.prepare_gradients`."""
        if not self.is_regular:
            super().prepare_gradients()


def _as_dict(config: Any) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return dict(config)
    if dataclasses.is_dataclass(config):
        return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return dict(vars(config))


def world_size() -> int:
    """Ranks of the default process group; 1 without one."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _is_storable(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_storable(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_storable, value))
    return value is None or isinstance(value, (str, int, float, bool, Path, torch.dtype, torch.device))
