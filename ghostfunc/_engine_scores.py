"""What the engine computes at a call: losses, the mean training gradient, dots and curvature, under autocast.

Under float16 losses are scaled inside, so that small gradients do not vanish, and the scale is taken out again.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ghostfunc._dots import ValGradient
from ghostfunc._engine_autocast import FLOAT16_LOSS_SCALE, Autocast, functionalized
from ghostfunc._engine_batch import size_of
from ghostfunc._engine_ranks import ranks_of, together, total
from ghostfunc._functionalize import LossFn
from ghostfunc._ranks import Group, Ranks
from ghostfunc._second_order import in_run_values
from ghostfunc._sharded import is_sharded
from ghostfunc._transforms import val_gradient, value_and_grad_dot


class Scores(NamedTuple):
    """What `Scorer` returns.

    Attributes:
        losses: `[n]`, of the training samples.
        val_losses: `[m]`, of the validation samples.
        grads: of the mean training loss of all ranks, by name; or shares of it, of which it is the mean over ranks.
        unused: names of parameters that it does not depend on.
        dots: <grad l_i, V> in the axes asked for.
        curved: `[n]`, the second-order part of the values at a learning rate of 1; None for order 1.
        all_n: training samples of all ranks.
    """

    losses: Tensor
    val_losses: Tensor
    grads: dict[str, Tensor]
    unused: tuple[str, ...]
    dots: Any
    curved: Tensor | None
    all_n: int

    @property
    def dots_per_sample(self) -> Tensor:
        """One dot per training sample `[n]`, whatever was asked for."""
        if isinstance(self.dots, dict):
            return torch.stack(list(self.dots.values())).sum(0)
        return self.dots.mean(1) if self.dots.dim() == 2 else self.dots


class Scorer:
    """Scores batches of a module.

    Args:
        loss: as in `functionalize`.
        call: as in `functionalize`.
        order: 1, or 2 for the second-order part too.
        options: `value_and_grad_dot`'s; for order 2 `out` and `schedule` have their defaults.
        group: of the ranks that have shares of the batches; None for those that the module is wrapped for.
    """

    def __init__(
        self,
        loss: LossFn,
        call: Callable[[nn.Module, Any], Any],
        order: int,
        options: dict[str, Any],
        group: Group | None = None,
    ) -> None:
        self._loss = loss
        self._call = call
        self._order = order
        self._options = options
        self._group = group
        self._loss_scale = FLOAT16_LOSS_SCALE
        self._made: tuple[Hashable, ValGradient] | None = None

    def ranks(self, module: nn.Module) -> Ranks | None:
        """Those that have shares of the batches; None where this process has all."""
        return ranks_of(module, self._group)

    def can_share(self) -> bool:
        """Whether one validation gradient can serve several calls."""
        about = getattr(self._options["precondition"], "about_train_gradient", False)
        each = "val" in self._options.get("out", "").split()
        return self._order == 1 and not about and not each and self._options["schedule"] != "joint"

    def takes_none(self, module: nn.Module) -> bool:
        """Whether a rank may have no sample: where it computes a share of the gradient alone."""
        return self.ranks(module) is not None and self.can_share() and not any(map(is_sharded, module.parameters()))

    def scores(self, module: nn.Module, batch: Any, val_batch: Any, step: Hashable = None) -> Scores:
        """Score a training batch against a validation batch.

        Args:
            module: the model.
            batch: the training batch.
            val_batch: the validation batch.
            step: where its gradient is to serve all calls of an optimizer's step: which step this is.

        Raises:
            NotImplementedError: for order 2 under float16 autocast.
            Exception: what the transforms raise.
        """
        autocast = Autocast.of(module)
        with autocast.left():
            if autocast.dtype != torch.float16:
                return self._scaled_scores(module, batch, val_batch, step, autocast, 1.0)
            if self._order == 2:
                raise NotImplementedError(
                    "order=2 under float16 autocast: scaled losses have a curvature that float16 cannot hold. Use "
                    "bfloat16 autocast, float32, or order=1."
                )
            # As GradScaler does, overflow halves the scale; unlike there, the step is tried again, not given up.
            ranks = self.ranks(module)
            scale = self._loss_scale
            found = self._scaled_scores(module, batch, val_batch, step, autocast, scale)
            while scale > 1 and total(ranks, _overflowed(found)):
                scale /= 2
                found = self._scaled_scores(module, batch, val_batch, step, autocast, scale)
            if scale > 1 or not total(ranks, _overflowed(found)):  # otherwise samples are at fault, not the scale
                self._loss_scale = scale
            return found

    def forget(self) -> None:
        """Forget the validation gradient that calls share."""
        self._made = None

    def losses(self, module: nn.Module, batch: Any) -> Tensor:
        """The losses `[n]` of a batch, without anything else."""
        model_fn, params = functionalized(module, self._loss, self._call, Autocast.of(module), 1.0)
        with torch.no_grad():
            return model_fn(params, batch)

    def _scaled_scores(
        self, module: nn.Module, batch: Any, val_batch: Any, step: Hashable, autocast: Autocast, scale: float
    ) -> Scores:
        """Run the transform on losses times `scale`, which is out of the results again."""
        model_fn, params = functionalized(module, self._loss, self._call, autocast, scale)
        ranks = self.ranks(module)
        group = None if ranks is None else ranks.group
        if self._order == 2:
            values = in_run_values(model_fn, params, batch, val_batch, lr=1.0, order=2, group=group, **self._options)
            all_n = total(ranks, len(values.losses))
            dots = values.first * all_n
            return Scores(values.losses, values.val_losses, values.grads, values.unused, dots, values.second, all_n)
        options: dict[str, Any] = self._options
        is_share = False
        if step is not None or (ranks is not None and self.can_share()):
            val_batch = self._val_gradient(module, model_fn, params, val_batch, (step, scale, autocast.dtype), ranks)
            options = {**options, "precondition": None}
            is_share = ranks is not None and not any(map(is_sharded, params.values()))
        else:
            self._made = None
        n = size_of(batch)
        if is_share:  # the gradients of micro-batches add up before they are reduced
            if n == 0:
                return self._share_of_none(params, val_batch, scale, ranks)
            with together(ranks):
                found = value_and_grad_dot(model_fn, params, batch, val_batch, **options)
        else:
            found = value_and_grad_dot(model_fn, params, batch, val_batch, group=group, **options)
        all_n = total(ranks, n)
        weight = n * ranks.size / all_n if is_share and ranks is not None else 1.0
        return Scores(  # the scale once out of what is linear in the losses, twice out of the dots
            found.losses / scale,
            found.val_losses / scale,
            found.grads if weight == scale else {name: grad * (weight / scale) for name, grad in found.grads.items()},
            found.unused,
            pytree.tree_map(lambda dots: dots / scale**2, found.dots),
            None,
            all_n,
        )

    def _share_of_none(self, params: dict[str, Tensor], val: ValGradient, scale: float, ranks: Ranks | None) -> Scores:
        """The share of a rank without samples, which takes part in what the others do, and adds nothing."""
        with together(ranks):
            none = val.losses.new_zeros(0)
        dots = dict.fromkeys(params, none) if "param" in self._options.get("out", "").split() else none
        grads = {name: torch.zeros_like(param) for name, param in params.items()}
        return Scores(none, val.losses / scale, grads, (), dots, None, total(ranks, 0))

    def _val_gradient(
        self, module: nn.Module, model_fn: Any, params: Any, val_batch: Any, about: tuple, ranks: Ranks | None
    ) -> ValGradient:
        """The validation gradient; that of an earlier call where, on all ranks, it still holds."""
        versions = [(t.data_ptr(), t._version) for t in (*module.parameters(), *module.buffers())]
        key = (*about, module.training, *versions)
        is_made = about[0] is not None and self._made is not None and self._made[0] == key
        if ranks is not None:
            is_made = ranks.total(is_made) == ranks.size
        if not is_made:
            precondition, dtype = self._options["precondition"], self._options["dtype"]
            group = None if ranks is None else ranks.group
            found = val_gradient(model_fn, params, val_batch, precondition=precondition, dtype=dtype, group=group)
            self._made = key, found
        assert self._made is not None
        return self._made[1]


def _overflowed(found: Scores) -> bool:
    grads: list[Any] = list(found.grads.values())
    tensors = [*(g.to_local() if is_sharded(g) else g for g in grads), *pytree.tree_leaves(found.dots)]
    return not bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())
