"""The engine under the seeds' entry: set up from a run's configuration, and harmless under plain training."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ghostfunc._engine import GradDotProdEngine
from ghostfunc._engine_batch import require_one_of, tensors_by_name
from ghostfunc._engine_output import EngineOutput
from ghostfunc._engine_ranks import average_gradients
from ghostfunc._functionalize import LossFn
from ghostfunc._losses import causal_lm_loss
from ghostfunc._ranks import world_size
from ghostfunc.dotlog import DotLog

_METHODS = ("GradDotProd", "Regular")


class GhostEngineManager(GradDotProdEngine):
    """The engine under the seeds' entry: set up from a run's configuration, and harmless under `method="Regular"`.

    Args:
        config: an `argparse.Namespace`, a dataclass, a mapping or any object with attributes. Read, where there:
            `method` ("GradDotProd", the default, or "Regular"), `dot_prod_save_interval` (10), `result_dir` (the log
            goes to `<result_dir>/dot_log`; without it nothing is stored), `out`, `layers`, `schedule`, `order` and
            `on_nonfinite`. Its values are stored with the log, except those that JSON cannot hold.
        model: the module.
        optimizer: its optimizer.
        ddp_info: a mapping; where `master_process` is false and there is but one rank, this process writes no log.
        val_data: `(X_val, Y_val)`; on several ranks this rank's share, or on each the whole.
        loss: as in `GradDotProdEngine`.
        call: as in `GradDotProdEngine`.
        precondition: as in `GradDotProdEngine`.

    Raises:
        ValueError: for an unknown method, or no `val_data` under GradDotProd.

    Under `"Regular"`, `ghost_engine(X, Y)` is a plain forward with the same loss, and every other verb does nothing.

    Where torch.distributed's default group has several ranks, these train together, as under `GradDotProdEngine`'s
    `group`, and each logs its own samples: `read_dot_log` has them all. `"Regular"` then averages gradients over the
    ranks in `prepare_gradients`, but those of `DistributedDataParallel` and of sharded parameters, which are averages.

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
        ranks = world_size()
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
            on_nonfinite=settings.get("on_nonfinite", "raise"),
            group=torch.distributed.group.WORLD if ranks > 1 else None,
        )
        result_dir = settings.get("result_dir")
        logs = ranks > 1 or (ddp_info or {}).get("master_process", True)
        if not self.is_regular and result_dir is not None and logs:
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
        """As `GradDotProdEngine.prepare_gradients`; under "Regular", average gradients over the ranks, if need be."""
        if not self.is_regular:
            super().prepare_gradients()
            return
        ranks = self._scorer.ranks(self.module)
        if ranks is not None and not isinstance(self.module, DistributedDataParallel):
            average_gradients(self.module, ranks)


def _as_dict(config: Any) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return dict(config)
    if dataclasses.is_dataclass(config):
        return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return dict(vars(config))


def _is_storable(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_storable(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_storable, value))
    return value is None or isinstance(value, (str, int, float, bool, Path, torch.dtype, torch.device))
