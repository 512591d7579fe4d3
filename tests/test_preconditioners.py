"""Preconditioners of optimizers, against torch's own steps, their derivatives by autograd, and a loop over samples."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import ghostfunc as gf

EXACT = 1e-10
Make = Callable[[nn.Module], torch.optim.Optimizer]


def gpt2(tied: bool = True) -> GPT2LMHeadModel:
    config = GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=5, use_cache=False, bos_token_id=0, eos_token_id=0,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double().eval()


def tokens(n: int, seed: int, below: int = 11) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(below, (n, 5), generator=generator)}


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()


def images(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 3, 3, generator=generator, dtype=torch.float64), torch.arange(n) % 3


MODELS = {"gpt2": (gpt2, tokens, gf.causal_lm_loss), "convolution": (convolution, images, gf.classification_loss)}


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups that differ in everything."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    return [
        {"params": matrices, "weight_decay": 0.1},
        {"params": others, "weight_decay": 0.0, "lr": 5e-3, "betas": (0.7, 0.9), "eps": 1e-6},
    ]


ADAMS: dict[str, Make] = {
    "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=1e-2),
    "Adam with L2": lambda m: torch.optim.Adam(m.parameters(), lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95)),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.1),
    "groups": lambda m: torch.optim.AdamW(groups(m), lr=1e-2, betas=(0.9, 0.95)),
    "amsgrad": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, betas=(0.6, 0.5), amsgrad=True),
    "maximize": lambda m: torch.optim.Adam(m.parameters(), lr=1e-2, weight_decay=0.1, maximize=True, amsgrad=True),
    "foreach": lambda m: torch.optim.AdamW(groups(m), lr=1e-2, foreach=True),
    "fused": lambda m: torch.optim.AdamW(groups(m), lr=1e-2, fused=True, amsgrad=True),
    "lr as a tensor": lambda m: torch.optim.AdamW(m.parameters(), lr=torch.tensor(1e-2, dtype=torch.float64)),
}
KINDS = ["Adam", "Adam with L2", "AdamW", "groups", "amsgrad", "maximize"]  # the others differ in how, not in what
ADAFACTORS: dict[str, Make] = {
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters()),
    "Adafactor with decay": lambda m: torch.optim.Adafactor(m.parameters(), lr=0.8, weight_decay=0.1, maximize=True),
    "Adafactor groups": lambda m: torch.optim.Adafactor(
        [group | {"eps": (1e-9, 1e-4), "d": 2.0} for group in groups(m)], lr=1e-2, beta2_decay=-0.4, foreach=True
    ),
}
if not hasattr(torch.optim, "Adafactor"):  # before torch 2.5
    ADAFACTORS.clear()


def setting(make: Make, steps: int, model: str = "gpt2") -> Any:
    """A model after some real steps, with the per-sample gradients of the next."""
    build, data, loss = MODELS[model]
    module = build()
    optimizer = make(module)
    model_fn, params = gf.functionalize(module, loss)
    for step in range(steps):
        take_step(module, optimizer, oracle.mean(oracle.per_sample_grads(model_fn, params, data(4, 10 + step))))
    train, val = data(4, 1), data(3, 2)
    g, v = (oracle.per_sample_grads(model_fn, params, batch) for batch in (train, val))
    return SimpleNamespace(
        module=module, optimizer=optimizer, model_fn=model_fn, params=params, train=train, val=val, g=g,
        mean=oracle.mean(g), v=oracle.mean(v),
    )  # fmt: skip


def take_step(module: nn.Module, optimizer: torch.optim.Optimizer, gradient: dict[str, Tensor]) -> None:
    for name, p in module.named_parameters():
        p.grad = gradient[name].clone()
    optimizer.step()
    optimizer.zero_grad()


def real_change(s: Any, gradient: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a real step adds to the parameters, divided by minus the first group's learning rate; nothing is changed."""
    module, optimizer = copy.deepcopy((s.module, s.optimizer))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    take_step(module, optimizer, gradient)
    lr = float(optimizer.param_groups[0]["lr"])
    return {name: (before[name] - p.detach()) / lr for name, p in module.named_parameters()}


def derivative_of_real_step(s: Any, direction: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of <V, change / -lr> with respect to the mean train gradient, by autograd through torch's step."""
    names = [name for name, _ in s.module.named_parameters()]
    at = {id(p): name for name, p in s.module.named_parameters()}
    copies = {name: s.params[name].clone() for name in names}
    ways = {"foreach": False, "fused": False, "differentiable": True}
    param_groups = [
        {k: v for k, v in group.items() if k not in ways}
        | {"params": [copies[at[id(p)]] for p in group["params"]], "lr": float(group["lr"])}
        for group in s.optimizer.param_groups
    ]
    optimizer = type(s.optimizer)(param_groups, **ways)
    for p, state in s.optimizer.state.items():  # the step in float64, in which this kind of step corrects the moments
        optimizer.state[copies[at[id(p)]]] = {key: value.clone().double() for key, value in state.items()}
    gradient = {name: s.mean[name].clone().requires_grad_() for name in names}
    for name in names:
        copies[name].grad = gradient[name]
    torch.set_default_dtype(torch.float64)
    try:
        optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    lr = float(s.optimizer.param_groups[0]["lr"])
    moved = sum((direction[name] * copies[name]).sum() for name in names) / -lr
    found = dict(zip(names, torch.autograd.grad(moved, list(gradient.values())), strict=True))
    # Autograd has no derivative of the root at 0: where no loss depends on an entry (the last position), and V is 0.
    return {name: torch.where((s.mean[name] == 0) & (direction[name] == 0), 0, d) for name, d in found.items()}


def times_slope(s: Any, share: Tensor, name: str) -> Tensor:
    """V share / g, entry by entry; 0 where no loss depends on an entry."""
    return torch.where(s.mean[name] == 0, 0, share / s.mean[name] * s.v[name])


def frozen_by_hand(s: Any, direction: dict[str, Tensor]) -> dict[str, Tensor]:
    """The diagonal with the second moment of the step before, written out."""
    found = {}
    for name, p in s.module.named_parameters():
        group = next(g for g in s.optimizer.param_groups if any(p is q for q in g["params"]))
        state = s.optimizer.state[p]
        t = float(state["step"]) + 1
        second = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
        corrected = second / (1 - group["betas"][1] ** (t - 1))
        scale = float(group["lr"]) / float(s.optimizer.param_groups[0]["lr"]) * (-1 if group["maximize"] else 1)
        first = (1 - group["betas"][0]) / (1 - group["betas"][0] ** t)
        found[name] = scale * first / (corrected.sqrt() + group["eps"]) * direction[name]
    return found


def assert_preconditioned_dots(s: Any, precondition: Any, direction: dict[str, Tensor]) -> None:
    for out in ("train", "param train"):
        actual = gf.ghost_grad_dot(s.model_fn, s.params, s.train, s.val, precondition=precondition, out=out)
        if out == "train":
            oracle.assert_dots(actual, oracle.dots(s.g, direction), EXACT, out)
        else:
            expected = {name: oracle.dots({name: s.g[name]}, {name: direction[name]}) for name in s.g}
            oracle.assert_dots_by_name(actual, expected, EXACT, out)
    result = gf.value_and_grad_dot(s.model_fn, s.params, s.train, s.val, precondition=precondition)
    oracle.assert_dots(result.dots, oracle.dots(s.g, direction), EXACT, "value_and_grad_dot")
    oracle.assert_grads(result.grads, s.mean, EXACT, "the gradient")


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("name", [*ADAMS, *ADAFACTORS])
def test_update_is_what_the_optimizer_does(name, steps):
    s = setting((ADAMS | ADAFACTORS)[name], steps)
    precondition = (gf.adam if name in ADAMS else gf.adafactor)(s.optimizer, s.module)
    before = {p: {k: v.clone() for k, v in state.items()} for p, state in s.optimizer.state.items()}
    oracle.assert_grads(precondition.update(s.mean), real_change(s, s.mean), EXACT, name)
    for p, state in before.items():
        assert all(torch.equal(value, s.optimizer.state[p][key]) for key, value in state.items())
    assert len(s.optimizer.state) == len(before)


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("name", KINDS)
def test_exact_adam_is_the_derivative_of_the_step(name, steps):
    s = setting(ADAMS[name], steps)
    if steps == 0:  # with eps = 1e-8 autograd subtracts what is equal in eight digits
        for group in s.optimizer.param_groups:
            group["eps"] = 1e-2
    precondition = gf.adam(s.optimizer, s.module, exact=True)
    direction = derivative_of_real_step(s, s.v)
    oracle.assert_grads(precondition(s.v, s.mean), direction, EXACT, name)


@pytest.mark.parametrize("model", MODELS)
def test_exact_dots(model):
    s = setting(ADAMS["groups"], 2, model)
    assert_preconditioned_dots(s, gf.adam(s.optimizer, s.module, exact=True), derivative_of_real_step(s, s.v))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", KINDS)
def test_adam_with_the_second_moment_of_the_step_before(name, model):
    s = setting(ADAMS[name], 3, model)
    precondition = gf.adam(s.optimizer, s.module)
    assert not precondition.about_train_gradient
    direction = frozen_by_hand(s, s.v)
    oracle.assert_grads(precondition(s.v), direction, EXACT, name)
    assert_preconditioned_dots(s, precondition, direction)


def test_dots_are_what_a_real_step_does_to_the_validation_loss():
    """lr / n * dots[i] against the validation loss after steps that weigh sample i a little more and a little less."""
    lr, n, h = 1e-7, 4, 1e-2
    s = setting(lambda m: torch.optim.AdamW(groups(m), lr=1e-2, betas=(0.9, 0.95)), 3)
    for group in s.optimizer.param_groups:
        group["lr"] *= lr / 1e-2
    exact = gf.adam(s.optimizer, s.module, exact=True)
    dots = gf.ghost_grad_dot(s.model_fn, s.params, s.train, s.val, precondition=exact)

    def loss_after(gradient: dict[str, Tensor]) -> Tensor:
        change = real_change(s, gradient)
        return s.model_fn({k: p - lr * change[k] for k, p in s.params.items()}, s.val).mean()

    for i in range(n):
        more, less = ({k: g + sign * h * s.g[k][i] / n for k, g in s.mean.items()} for sign in (1, -1))
        decrease = (loss_after(less) - loss_after(more)) / (2 * h)
        torch.testing.assert_close(lr / n * dots[i], decrease, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "groups", "amsgrad"])
def test_at_step_0_the_samples_share_out_adams_step(name):
    s = setting(ADAMS[name], 0)
    precondition = gf.adam(s.optimizer, s.module)
    assert precondition.about_train_gradient
    change = real_change(s, s.mean)
    for p_name, p in s.module.named_parameters():
        group = next(g for g in s.optimizer.param_groups if any(p is q for q in g["params"]))
        decay = group["weight_decay"] if isinstance(s.optimizer, torch.optim.AdamW) else 0
        change[p_name] -= decay * p.detach() * float(group["lr"]) / float(s.optimizer.param_groups[0]["lr"])
    oracle.assert_grads(precondition(s.mean, s.mean), change, EXACT, name)
    dots = gf.ghost_grad_dot(s.model_fn, s.params, s.train, s.val, precondition=precondition)
    whole = sum((s.v[k] * change[k]).sum() for k in change)
    torch.testing.assert_close(dots.mean(), whole, rtol=1e-9, atol=1e-12)
    assert_preconditioned_dots(s, precondition, {k: times_slope(s, change[k], k) for k in change})


def test_the_exact_derivative_of_the_first_step_is_nearly_nothing():
    s = setting(ADAMS["AdamW"], 0)
    exact = gf.adam(s.optimizer, s.module, exact=True)
    direction = {name: 1e-8 / (s.mean[name].abs() + 1e-8) ** 2 * v for name, v in s.v.items()}  # of g / (|g| + eps)
    oracle.assert_grads(exact(s.v, s.mean), direction, EXACT, "direction")
    assert_preconditioned_dots(s, exact, direction)
    shares = gf.adam(s.optimizer, s.module)(s.v, s.mean)
    name = "transformer.h.0.mlp.c_fc.weight"
    assert direction[name].norm() < 1e-2 * shares[name].norm()


def test_entries_without_a_second_moment():
    """An untied embedding's row whose token comes for the first time; a position that no loss depends on."""
    module = gpt2(tied=False)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)
    model_fn, params = gf.functionalize(module, gf.causal_lm_loss)
    for step in range(3):
        batch = tokens(4, step, below=6)
        take_step(module, optimizer, oracle.mean(oracle.per_sample_grads(model_fn, params, batch)))
    train, val = tokens(4, 1), tokens(3, 2)
    g, v = (oracle.per_sample_grads(model_fn, params, batch) for batch in (train, val))
    rows = optimizer.state[module.transformer.wte.weight]["exp_avg_sq"].sum(1) == 0
    name = "transformer.wte.weight"
    assert rows.tolist() == [False] * 6 + [True] * 5
    assert (oracle.mean(g)[name][rows] * oracle.mean(v)[name][rows]).any()
    s = SimpleNamespace(
        module=module, optimizer=optimizer, model_fn=model_fn, params=params, train=train, val=val, g=g,
        mean=oracle.mean(g), v=oracle.mean(v),
    )  # fmt: skip
    direction = frozen_by_hand(s, s.v)
    direction[name][rows] = 0
    direction["transformer.wpe.weight"][4:] = 0
    assert_preconditioned_dots(s, gf.adam(optimizer, module), direction)
    exact = gf.adam(optimizer, module, exact=True)(s.v, s.mean)[name][rows]
    seen = s.mean[name][rows] != 0
    assert (exact[seen].abs() < 1e-3 * (s.v[name][rows] / s.mean[name][rows])[seen].abs().max()).all()


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", ADAFACTORS)
def test_adafactor_shares_out_its_step(name, steps):
    s = setting(ADAFACTORS[name], steps, "convolution")
    precondition = gf.adafactor(s.optimizer, s.module)
    change, direction = real_change(s, s.mean), {}
    for p_name, p in s.module.named_parameters():
        group = next(g for g in s.optimizer.param_groups if any(p is q for q in g["params"]))
        decay = group["weight_decay"] * group["lr"] / s.optimizer.param_groups[0]["lr"] * p.detach()
        direction[p_name] = times_slope(s, change[p_name] - decay, p_name)
    assert_preconditioned_dots(s, precondition, direction)


def test_diagonal():
    s = setting(ADAMS["Adam"], 0)
    weights = {name: torch.rand_like(p) for name, p in s.params.items()} | {"transformer.ln_f.bias": 0.3}
    direction = {name: weights[name] * v for name, v in s.v.items()}
    for given in (weights, weights.__getitem__):
        precondition = gf.diagonal(given)
        assert_preconditioned_dots(s, precondition, direction)
        assert all(torch.equal(u, weights[k] * s.mean[k]) for k, u in precondition.update(s.mean).items())


def test_the_state_and_the_learning_rate_are_read_at_every_call():
    s = setting(ADAMS["groups"], 1)
    precondition = gf.adam(s.optimizer, s.module)
    before = precondition(s.v)
    take_step(s.module, s.optimizer, s.mean)
    oracle.assert_grads(precondition(s.v), frozen_by_hand(s, s.v), EXACT, "after a step")
    s.optimizer.param_groups[1]["lr"] = 0.0
    after = precondition(s.v)
    assert not after["transformer.ln_f.bias"].any()
    assert not torch.equal(after["transformer.wpe.weight"], before["transformer.wpe.weight"])


def test_float32_parameters_and_bfloat16_ones():
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 4e-2)):  # the real one is rounded to the dtype
        module = nn.Linear(6, 4).to(dtype)
        optimizer = torch.optim.AdamW(module.parameters(), lr=2**-4, weight_decay=0.1)
        for _ in range(2):
            take_step(module, optimizer, {name: torch.randn_like(p) for name, p in module.named_parameters()})
        s = SimpleNamespace(module=module, optimizer=optimizer)
        gradient = {name: torch.randn_like(p) for name, p in module.named_parameters()}
        update = gf.adam(optimizer, module).update(gradient)
        assert all(u.dtype == torch.float32 for u in update.values())
        oracle.assert_grads(update, real_change(s, gradient), tolerance, str(dtype))


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


IMPORTS = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch.compile's own


@IMPORTS
def test_names_survive_wrappers(process_group):
    s = setting(ADAMS["groups"], 2)
    expected = frozen_by_hand(s, s.v)
    data_parallel = nn.parallel.DistributedDataParallel(s.module)
    both = torch.compile(data_parallel)
    assert next(name for name, _ in both.named_parameters()) == "_orig_mod.module.transformer.wte.weight"
    for wrapped in (data_parallel, torch.compile(s.module), both):
        oracle.assert_grads(gf.adam(s.optimizer, wrapped)(s.v), expected, EXACT, "the wrapped model is given")
        renamed = dict(zip((name for name, _ in wrapped.named_parameters()), s.v.values(), strict=True))
        found = gf.adam(s.optimizer, s.module)(renamed)
        assert list(found) == list(renamed)
        for value, reference in zip(found.values(), expected.values(), strict=True):
            torch.testing.assert_close(value, reference, rtol=EXACT, atol=0)


def test_a_tied_parameter_goes_by_any_of_its_names():
    s = setting(ADAMS["AdamW"], 2)
    by_other_name = {"lm_head.weight": s.v["transformer.wte.weight"]}
    found = gf.adam(s.optimizer, s.module)(by_other_name)
    torch.testing.assert_close(found["lm_head.weight"], frozen_by_hand(s, s.v)["transformer.wte.weight"])


class _WithModule(nn.Module):
    """Names that differ in what may be a wrapper's prefix."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 3)
        self.weight = nn.Parameter(torch.zeros(3, 2))


@IMPORTS
def test_ambiguous_names_are_refused():
    model = _WithModule()
    optimizer = torch.optim.Adam(model.parameters())
    take_step(model, optimizer, {name: torch.ones_like(p) for name, p in model.named_parameters()})
    names = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    assert list(gf.adam(optimizer, model)(names)) == ["weight", "module.weight", "module.bias"]
    with pytest.raises(ValueError, match="may be several parameters"):
        gf.adam(optimizer, torch.compile(model))(names)


class _OwnStep(torch.optim.Adam):
    def step(self, closure=None):
        return super().step(closure)


def test_errors():
    model, other = nn.Linear(4, 3), nn.Linear(5, 3)
    fine = torch.optim.AdamW(model.parameters())
    direction = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    for optimizer in (torch.optim.SGD(model.parameters(), lr=1), torch.optim.NAdam(model.parameters())):
        with pytest.raises(TypeError, match=r"torch\.optim\.Adam, torch\.optim\.AdamW"):
            gf.adam(optimizer, model)
    with pytest.raises(TypeError, match=r"torch\.optim\.Adafactor"):  # an old torch does not have it
        gf.adafactor(fine, model)
    with pytest.raises(TypeError, match="_OwnStep"):
        gf.adam(_OwnStep(model.parameters()), model)
    with pytest.raises(ValueError, match=r"does not hold 'bias' of shape \(3,\)"):
        gf.adam(torch.optim.Adam([model.weight]), model)(direction, direction)
    with pytest.raises(ValueError, match="no parameter head; it has weight, bias"):
        gf.adam(fine, model).update({"head": torch.ones(3)})
    with pytest.raises(ValueError, match=r"'weight' has shape \(3, 4\) in the gradient, \(3, 5\) in the model"):
        gf.adam(torch.optim.Adam(other.parameters()), other)(direction, direction)
    with pytest.raises(ValueError, match="at step 0"):
        gf.adam(fine, model)(direction)
    with pytest.raises(ValueError, match="mean train gradient has no entry for 'bias'"):
        gf.adam(fine, model)(direction, {"weight": direction["weight"]})
    with pytest.raises(ValueError, match="exact=True"):
        gf.adam(fine, model, exact=True)(direction)
    two = [{"params": [model.weight], "lr": 0.0}, {"params": [model.bias], "lr": 0.1}]
    with pytest.raises(ValueError, match="first parameter group has learning rate 0"):
        gf.adam(torch.optim.Adam(two), model)(direction, direction)
    with pytest.raises(ValueError, match="no weights for 'bias'"):
        gf.diagonal({"weight": 1.0})(direction)
    with pytest.raises(ValueError, match=r"'weight' have shape \(3,\).*\(3, 4\)"):
        gf.diagonal(lambda name: torch.ones(3))(direction)


def test_a_learning_rate_of_zero_everywhere():
    s = setting(ADAMS["AdamW"], 2)
    expected = frozen_by_hand(s, s.v)
    s.optimizer.param_groups[0]["lr"] = 0.0
    oracle.assert_grads(gf.adam(s.optimizer, s.module)(s.v), expected, EXACT, "a warm-up's first step")


def test_a_frozen_parameter_in_the_optimizer_has_no_part():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double()
    optimizer = torch.optim.AdamW(model.parameters())
    model[0].requires_grad_(False)
    model_fn, params = gf.functionalize(model, gf.classification_loss)
    train, val = ((torch.randn(n, 4, dtype=torch.float64), torch.arange(n) % 3) for n in (5, 2))
    model_fn(dict(model.named_parameters()), train).mean().backward()
    optimizer.step()
    precondition = gf.adam(optimizer, model)
    assert not precondition.about_train_gradient
    dots = gf.ghost_grad_dot(model_fn, params, train, val, precondition=precondition)
    g, v = (oracle.per_sample_grads(model_fn, params, batch) for batch in (train, val))
    oracle.assert_dots(dots, oracle.dots(g, precondition(oracle.mean(v))), EXACT, "dots")
