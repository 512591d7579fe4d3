"""What is refused, in which words, and what a refusal leaves behind: nothing."""

import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, Case, Draw, classes, functionalized
from hard import HARD, lookup
from oracle import assert_dots, assert_grads, dots, losses_and_grads, mean
from torch import Tensor, nn

import ghostfunc as gf

CPU = torch.device("cpu")
SCHEDULES = ("joint", "two-phase", "auto")
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:.*torch.jit.script.*")


@pytest.fixture
def mlp():
    return BY_NAME["mlp"].make(torch.float64, CPU)


def assert_no_state_left() -> None:
    assert torch.is_grad_enabled()
    assert not torch.overrides._get_current_function_mode_stack()
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


# --- exact or refused, and nothing else -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", HARD, ids=lambda case: case.name)
@pytest.mark.parametrize("schedule", ["joint", "two-phase"])
def test_exact_or_refused_by_name(case: Case, schedule: str, device: torch.device) -> None:
    """No use of a parameter is silently wrong, and `on_unsupported="dense"` makes every one exact."""
    model_fn, params, batch = case.make(torch.float64, device)
    train, val = batch(4, 1), batch(3, 2)
    _, g = losses_and_grads(model_fn, params, train)
    _, v = losses_and_grads(model_fn, params, val)
    try:
        result = gf.value_and_grad_dot(model_fn, params, train, val, schedule=schedule)
    except gf.UnsupportedUse as refusal:
        assert refusal.parameters
        assert set(refusal.parameters) <= set(params)
        for name in refusal.parameters:
            assert name in str(refusal)
        assert "dense" in str(refusal)
    else:
        assert_dots(result.dots, dots(g, mean(v)), 1e-10, case.name)
        assert_grads(result.grads, mean(g), 1e-10, case.name)
    assert_no_state_left()


@pytest.mark.parametrize("case", HARD, ids=lambda case: case.name)
def test_dense_is_exact(case: Case, device: torch.device) -> None:
    """What has no factors is exact with `on_unsupported="dense"`."""
    model_fn, params, batch = case.make(torch.float64, device)
    train, val = batch(4, 1), batch(3, 2)
    _, g = losses_and_grads(model_fn, params, train)
    _, v = losses_and_grads(model_fn, params, val)
    result = gf.value_and_grad_dot(model_fn, params, train, val, on_unsupported="dense")
    assert_dots(result.dots, dots(g, mean(v)), 1e-10, case.name)
    assert_grads(result.grads, mean(g), 1e-10, case.name)


def test_own_autograd_function(device):
    """A user's Function around a parameter: refused by the parameter's name, and exact when asked for."""
    model_fn, params, batch = {case.name: case for case in HARD}["autograd function"].make(torch.float64, device)
    train, val = batch(4, 1), batch(3, 2)
    for schedule in SCHEDULES:
        with pytest.raises(gf.UnsupportedUse, match=r"^s \(4,\)") as refusal:
            gf.ghost_grad_dot(model_fn, params, train, val, schedule=schedule)
        assert refusal.value.parameters == ("s",)
    with pytest.raises(gf.UnsupportedUse, match=r"^s \(4,\)"):
        gf.ghost_grad_along(model_fn, params, train, params)
    with pytest.raises(gf.UnsupportedUse, match=r"^s \(4,\)"):
        gf.ghost_factors(model_fn, params, train)
    _, g = losses_and_grads(model_fn, params, train)
    _, v = losses_and_grads(model_fn, params, val)
    for schedule in SCHEDULES:
        result = gf.value_and_grad_dot(model_fn, params, train, val, on_unsupported="dense", schedule=schedule)
        assert_dots(result.dots, dots(g, mean(v)), 1e-10, schedule)
        assert_grads(result.grads, mean(g), 1e-10, schedule)
    along = gf.ghost_grad_along(model_fn, params, train, params, on_unsupported="dense")
    assert_dots(along, dots(g, params), 1e-10, "along")


# --- samples that interact --------------------------------------------------------------------------------------------


def contrastive(p: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    h = F.normalize(F.linear(batch[0], p["w"]), dim=-1)
    return F.cross_entropy(h @ h.T, torch.arange(len(h)), reduction="none")


def centred(p: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    losses = F.cross_entropy(F.linear(batch[0], p["w"]), batch[1], reduction="none")
    return losses - losses.mean()


def load_balanced(p: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    router = F.linear(batch[0], p["w"]).softmax(-1)
    return F.cross_entropy(F.linear(batch[0], p["v"]), batch[1], reduction="none") + router.mean(0).pow(2).sum()


def rolled(p: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    h = F.linear(batch[0], p["w"]).tanh()
    return (h + 0.5 * h.roll(1, 0)).pow(2).sum(-1)


def shifted(p: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    h = F.linear(batch[0], p["w"]).tanh()
    return (h + F.pad(h, (0, 0, 1, -1))).pow(2).sum(-1)  # the batch dimension keeps its length


def attending(p: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    h = F.linear(batch[0], p["w"])[None]  # the batch where the positions should be
    return F.scaled_dot_product_attention(h, h, h)[0].pow(2).sum(-1)


def normalised(p: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    h = F.linear(batch[0], p["w"])
    return F.cross_entropy((h - h.mean(0)) / (1 + h.std(0)), batch[1], reduction="none")


def scrambled(p: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    h = F.linear(batch[0], p["w"]).tanh()  # [B, 3]
    return h.T.reshape(len(h), 3).cumsum(1).pow(2).sum(1)  # no transpose back


def ranked(p: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    losses = F.cross_entropy(F.linear(batch[0], p["w"]), batch[1], reduction="none")
    return losses.sort().values


MIXING = [contrastive, centred, load_balanced, rolled, shifted, attending, normalised, scrambled, ranked]


@pytest.mark.parametrize("model_fn", MIXING)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_interacting_samples_are_refused(model_fn, schedule):
    draw = Draw(torch.float64, CPU)
    params = draw.params(w=(3, 5), v=(3, 5)) if model_fn is load_balanced else draw.params(w=(3, 5))
    batch = classes(torch.float64, CPU, 5)
    with pytest.raises(gf.InteractingSamples, match="sample"):
        gf.value_and_grad_dot(model_fn, params, batch(4, 1), batch(3, 2), schedule=schedule)
    with pytest.raises(gf.InteractingSamples, match="sample"):
        gf.ghost_grad_along(model_fn, params, batch(4, 1), params)
    with pytest.raises(gf.InteractingSamples, match="sample"):
        gf.verify(model_fn, params, batch(4, 1))
    assert_no_state_left()


@pytest.mark.parametrize("on_unsupported", ["raise", "dense"])
def test_batch_norm_in_training_is_refused_and_its_buffers_are_left_alone(on_unsupported):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).train()
    model_fn, params = functionalized(module, gf.classification_loss, torch.float64, CPU)
    batch = classes(torch.float64, CPU, 5)
    before = {name: b.clone() for name, b in module.named_buffers()}
    for schedule in SCHEDULES:
        with pytest.raises(gf.InteractingSamples):
            gf.value_and_grad_dot(
                model_fn, params, batch(4, 1), batch(3, 2), schedule=schedule, on_unsupported=on_unsupported
            )
    assert before
    for name, b in module.named_buffers():
        assert torch.equal(b, before[name]), name
    assert module.training
    assert_no_state_left()


def test_batch_norm_in_eval_mode_moves_no_buffer():
    model_fn, params, batch = BY_NAME["batch norm in eval mode"].make(torch.float64, CPU)
    gf.ghost_grad_dot(model_fn, params, batch(4, 1), batch(3, 2))
    assert_no_state_left()


# --- losses and batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["value_and_grad_dot", "ghost_grad_dot", "ghost_grad_along", "ghost_factors"])
class TestEveryTransform:
    """What every transform refuses in the same words."""

    @staticmethod
    def run(call, model_fn, params, batch):
        if call == "ghost_factors":
            return gf.ghost_factors(model_fn, params, batch)
        if call == "ghost_grad_along":
            return gf.ghost_grad_along(model_fn, params, batch, params)
        return getattr(gf, call)(model_fn, params, batch, batch)

    def test_scalar_loss(self, call, mlp):
        with pytest.raises(ValueError, match=r"(?s)scalar.*reduction='none'"):
            self.run(call, lambda p, b: mlp.model_fn(p, b).mean(), mlp.params, mlp.batch(4, 1))

    def test_loss_per_token(self, call):
        model_fn, params, batch = BY_NAME["sequence first T=4, the train batch"].make(torch.float64, CPU)

        def per_token(p, b):
            return model_fn(p, b)[:, None].expand(-1, 3)

        with pytest.raises(ValueError, match=r"\(\d, 3\).*expected \[\d\]"):
            self.run(call, per_token, params, batch(4, 1))

    def test_loss_that_is_no_tensor(self, call, mlp):
        with pytest.raises((TypeError, ValueError), match="dict"):
            self.run(call, lambda p, b: {"loss": mlp.model_fn(p, b)}, mlp.params, mlp.batch(4, 1))

    def test_empty_batch(self, call, mlp):
        with pytest.raises(ValueError, match=r"(?i)empty|no sample|0 samples"):
            self.run(call, mlp.model_fn, mlp.params, mlp.batch(0, 1))

    def test_batch_without_tensors(self, call, mlp):
        with pytest.raises((TypeError, ValueError), match="tensor"):
            self.run(call, mlp.model_fn, mlp.params, {})

    def test_unequal_first_dimensions(self, call, mlp):
        x, y = mlp.batch(4, 1)
        with pytest.raises(ValueError, match=r"(?s)4.*3|3.*4"):
            self.run(call, mlp.model_fn, mlp.params, (x, y[:3]))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_non_finite_loss_names_the_samples(self, call, bad):
        model_fn, params, batch = BY_NAME["regularised"].make(torch.float64, CPU)
        x, y = batch(6, 1)
        x[1, 0] = x[4, 2] = bad
        with pytest.raises(ValueError, match=r"\[1, 4"):
            self.run(call, model_fn, params, (x, y))

    def test_id_outside_the_vocabulary(self, call):
        params = Draw(torch.float64, CPU).params(table=(7, 4))
        for bad in (7, -1):
            ids = torch.tensor([[0, 1], [2, bad], [3, 3]])
            with pytest.raises((IndexError, ValueError), match=rf"(?s)(?=.*table)(?=.*{bad})(?=.*7)"):
                self.run(call, lookup, params, {"ids": ids})

    def test_no_parameters(self, call, mlp):
        with pytest.raises(ValueError, match="param"):
            self.run(call, mlp.model_fn, {}, mlp.batch(4, 1))

    def test_integer_parameter(self, call, mlp):
        params = {**mlp.params, "steps": torch.tensor([3])}
        with pytest.raises((TypeError, ValueError), match=r"(?s)steps.*int64"):
            self.run(call, mlp.model_fn, params, mlp.batch(4, 1))

    def test_parameter_that_is_no_tensor(self, call, mlp):
        params = {**mlp.params, "rate": 0.1}
        with pytest.raises((TypeError, ValueError), match=r"(?s)rate.*float"):
            self.run(call, mlp.model_fn, params, mlp.batch(4, 1))

    def test_exception_inside_the_model(self, call, mlp):
        """The exception comes through as it is, and nothing is left behind."""
        torch.manual_seed(5)
        module = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).double()
        before = {name: t.clone() for name, t in module.state_dict().items()}

        def broken(output, batch):
            torch.rand(3)
            raise LookupError("the loss broke")

        model_fn, params = gf.functionalize(module, broken)
        versions = {name: p._version for name, p in params.items()}
        torch.manual_seed(11)
        with pytest.raises(LookupError, match="the loss broke"):
            self.run(call, model_fn, params, mlp.batch(4, 1))
        assert_no_state_left()
        assert versions == {name: p._version for name, p in params.items()}
        assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in module.parameters())
        assert [name for name, _ in module.named_parameters()] == list(params)
        assert all(type(p) is nn.Parameter for p in module.parameters())
        x = torch.randn(2, 5, dtype=torch.float64)
        assert module(x).shape == (2, 3)  # the module still runs, with its own weights

    def test_exception_in_backward(self, call):
        class Broken(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, g):
                raise LookupError("the backward broke")

        model_fn, params, batch = BY_NAME["weight twice"].make(torch.float64, CPU)

        def broken(p, b):
            return Broken.apply(model_fn(p, b))

        with pytest.raises(LookupError, match="the backward broke"):
            self.run(call, broken, params, batch(4, 1))
        assert_no_state_left()
        assert all(p.grad is None and not p.requires_grad for p in params.values())


WITH_OPTIONS = pytest.mark.parametrize("call", ["value_and_grad_dot", "ghost_grad_dot", "ghost_grad_along"])


@WITH_OPTIONS
def test_unknown_layers(call, mlp):
    other = mlp.params if call == "ghost_grad_along" else mlp.batch(2, 2)
    with pytest.raises(ValueError, match=r"(?s)(?=.*decoder)(?=.*0\.weight)(?=.*4\.weight)"):
        getattr(gf, call)(mlp.model_fn, mlp.params, mlp.batch(4, 1), other, layers="0,decoder")


@WITH_OPTIONS
@pytest.mark.parametrize("out", ["trian", "train train", "train sample", "param layer", "train other"])
def test_unknown_out(call, out, mlp):
    other = mlp.params if call == "ghost_grad_along" else mlp.batch(2, 2)
    with pytest.raises(ValueError, match=r"(?s)(?=.*param)(?=.*(train|sample))"):
        getattr(gf, call)(mlp.model_fn, mlp.params, mlp.batch(4, 1), other, out=out)


# --- options ----------------------------------------------------------------------------------------------------------


def test_joint_refuses_unequal_shapes():
    model_fn, params, batch = BY_NAME["gpt2 tied"].make(torch.float64, CPU)
    val = {"input_ids": batch(3, 2)["input_ids"][:, :2]}
    with pytest.raises(ValueError, match=r"(?s)(?=.*joint)(?=.*6)(?=.*2)(?=.*two-phase)"):
        gf.ghost_grad_dot(model_fn, params, batch(4, 1), val, schedule="joint")


def test_joint_refuses_unequal_structures(mlp):
    x, y = mlp.batch(3, 2)
    with pytest.raises(ValueError, match="joint"):
        gf.ghost_grad_dot(mlp.model_fn, mlp.params, mlp.batch(4, 1), [x, y], schedule="joint")


def test_joint_refuses_a_preconditioner(mlp):
    with pytest.raises(ValueError, match=r"(?s)precondition.*two-phase|two-phase.*precondition"):
        gf.ghost_grad_dot(
            mlp.model_fn, mlp.params, mlp.batch(4, 1), mlp.batch(3, 2), schedule="joint", precondition=dict
        )


@pytest.mark.parametrize(
    ("option", "value", "known"),
    [("schedule", "three-phase", "two-phase"), ("reduction", "max", "mean"), ("on_unsupported", "skip", "dense")],
)
def test_unknown_options_list_the_known_ones(option, value, known, mlp):
    for transform in (gf.ghost_grad_dot, gf.value_and_grad_dot):
        with pytest.raises(ValueError, match=rf"(?s)(?=.*{option})(?=.*{value})(?=.*{known})"):
            transform(mlp.model_fn, mlp.params, mlp.batch(4, 1), mlp.batch(3, 2), **{option: value})


def test_errors_say_which_batch(mlp):
    """The val batch's own faults are called the val batch's."""
    x, y = mlp.batch(3, 2)
    with pytest.raises(ValueError, match="val"):
        gf.ghost_grad_dot(mlp.model_fn, mlp.params, mlp.batch(4, 1), (x, y[:2]))
    x[2] = float("nan")
    for schedule in SCHEDULES:
        with pytest.raises(ValueError, match=r"(?=.*\bval\b)(?=.*\[2\])"):
            gf.ghost_grad_dot(mlp.model_fn, mlp.params, mlp.batch(4, 1), (x, y), schedule=schedule)


def test_direction_with_missing_and_unknown_names(mlp):
    direction = dict(mlp.params)
    del direction["2.bias"]
    with pytest.raises((ValueError, KeyError), match=r"2\.bias"):
        gf.ghost_grad_along(mlp.model_fn, mlp.params, mlp.batch(4, 1), direction)
    with pytest.raises((ValueError, KeyError), match=r"nonsense"):
        gf.ghost_grad_along(mlp.model_fn, mlp.params, mlp.batch(4, 1), {**mlp.params, "nonsense": torch.ones(2)})


def test_direction_of_another_shape(mlp):
    direction = {**mlp.params, "2.weight": torch.ones(8, 7, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"(?s)(?=.*2\.weight)(?=.*8, 7)(?=.*8, 8)"):
        gf.ghost_grad_along(mlp.model_fn, mlp.params, mlp.batch(4, 1), direction)


def test_verify_names_the_parameter():
    """A model with the same losses in a batch and alone, and another gradient, fails by the parameter's name."""

    def model_fn(p, batch):
        x = batch["x"]
        bad = 2 * p["bad"] - p["bad"].detach() if len(x) > 1 else p["bad"]
        return (F.linear(x, p["good"]) * bad).pow(2).sum(-1)

    params = Draw(torch.float64, CPU).params(good=(3, 4), bad=(3,))
    with pytest.raises(AssertionError, match="bad"):
        gf.verify(model_fn, params, {"x": Draw(torch.float64, CPU).normal(4, 4)})


def test_unused_parameters_are_reported():
    model_fn, params, batch = BY_NAME["unused"].make(torch.float64, CPU)
    plan = str(gf.explain(model_fn, params, batch(4, 1)))
    line = next(line for line in plan.splitlines() if "never" in line)
    assert "unused" in line
    result = gf.value_and_grad_dot(model_fn, params, batch(4, 1), batch(3, 2), out="param train")
    assert torch.equal(result.dots["never"], torch.zeros(4, dtype=torch.float64))
    assert torch.equal(result.grads["never"], torch.zeros(2, 2, dtype=torch.float64))


def test_functionalize_refuses_a_module_without_trainable_parameters():
    with pytest.raises(ValueError, match="requires_grad"):
        gf.functionalize(nn.Linear(2, 2).requires_grad_(False), gf.classification_loss)


def test_causal_lm_loss_shows_the_shapes():
    with pytest.raises(ValueError, match=r"(?s)\(2, 4\).*\(2, 5, 8\)"):
        gf.causal_lm_loss(torch.zeros(2, 5, 8), torch.zeros(2, 4, dtype=torch.long))
