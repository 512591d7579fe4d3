"""Convolutions of every geometry: exact against the loop, Outer where channels are not in groups, at the plain cost."""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases import Draw, squared
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_dots, assert_dots_by_name, assert_grads, dots, expected, mean, per_sample_grads
from test_flops import plain_step
from test_memory import Allocations
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

import ghostfunc as gf
from ghostfunc._factors import Dense, Outer

CPU = torch.device("cpu")
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
uneven = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # torch's, at even kernels


class Geometry(NamedTuple):
    """A convolution of `[channels, *image]` with its settings."""

    func: Callable[..., Tensor]
    image: tuple[int, ...]
    channels: int
    weight: tuple[int, ...]
    bias: int
    settings: dict[str, Any]


def built(geometry: Geometry, dtype: torch.dtype, device: torch.device):
    """A layer whose input depends on a parameter, then the convolution; and a maker of batches."""
    shapes: dict[str, tuple[int, ...]] = {"before": geometry.image, "w": geometry.weight}
    shapes |= {"b": (geometry.bias,)} if geometry.bias else {}

    def model_fn(p: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        h = (batch["x"] * p["before"]).tanh()
        out = geometry.func(h, p["w"], p.get("b"), **geometry.settings)
        return squared(out.tanh(), batch["y"].view(-1, *[1] * (out.dim() - 1)))

    def batch(n: int, seed: int) -> dict[str, Tensor]:
        draw = Draw(dtype, device, seed)
        return {"x": draw.normal(n, geometry.channels, *geometry.image), "y": draw.normal(n)}

    return model_fn, Draw(dtype, device).params(**shapes), batch


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    """Kernels of every size, stride, padding, dilation, output padding and number of groups, in 1 to 3 dimensions."""
    dims, transposed, groups = draw(st.integers(1, 3)), draw(st.booleans()), draw(st.integers(1, 3))
    sizes = st.lists(st.integers(1, 3), min_size=dims, max_size=dims)
    kernel, dilation, stride = draw(sizes), draw(sizes), draw(sizes)
    padding: Any = [draw(st.integers(0, 2)) for _ in range(dims)]
    span = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    c_in, c_out = (groups * draw(st.integers(1, 2)) for _ in range(2))
    bias = c_out * draw(st.booleans())
    settings: dict[str, Any] = {"dilation": dilation, "groups": groups}
    if transposed:
        most = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
        settings["output_padding"] = output = [draw(st.integers(0, m)) for m in most]
        least = [
            max(1, -(-(1 + 2 * p - e - o) // s) + 1) for s, p, e, o in zip(stride, padding, span, output, strict=True)
        ]
        weight = (c_in, c_out // groups, *kernel)
    else:
        if draw(st.booleans()):
            padding = draw(st.sampled_from(["same", "valid"]))
            stride = [1] * dims if padding == "same" else stride
        least = [
            max(1, e - 2 * p) for e, p in zip(span, [0] * dims if isinstance(padding, str) else padding, strict=True)
        ]
        weight = (c_out, c_in // groups, *kernel)
    image = tuple(size + draw(st.integers(0, 3)) for size in least)
    settings |= {"stride": stride, "padding": padding}
    if not isinstance(padding, str) and draw(st.booleans()):  # one number for all dimensions
        settings = {k: v[0] if isinstance(v, list) and len(set(v)) == 1 else v for k, v in settings.items()}
    return Geometry((TRANSPOSED if transposed else CONV)[dims], image, c_in, weight, bias, settings)


def check(model_fn, params, train, val, tolerance: float = 1e-10) -> dict[str, list[Any]]:
    """Products in two layouts and both schedules, gradients and factors, against the loop; returns the factors."""
    g, v = per_sample_grads(model_fn, params, train), per_sample_grads(model_fn, params, val)
    result = gf.value_and_grad_dot(model_fn, params, train, val, out="param train")
    assert_dots_by_name(result.dots, expected("param train", g, v), tolerance, "param train")
    assert_grads(result.grads, mean(g), tolerance, "grads")
    for schedule in ("joint", "two-phase"):
        matrix = gf.ghost_grad_dot(model_fn, params, train, val, out="train val", schedule=schedule)
        assert_dots(matrix, expected("train val", g, v), tolerance, f"train val, {schedule}")
    factors = gf.ghost_factors(model_fn, params, train)[1]
    dense = {name: sum(f.dense(params[name].shape) for f in of_name) for name, of_name in factors.items()}
    assert_grads(dense, g, tolerance, "factors")
    return factors


@uneven
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(geometry=geometries(), n=st.integers(1, 3), m=st.integers(1, 2))
def test_every_geometry(geometry, n, m):
    model_fn, params, batch = built(geometry, torch.float64, CPU)
    factors = check(model_fn, params, batch(n, 1), batch(m, 2))
    kind = Dense if geometry.settings["groups"] > 1 else Outer
    assert [type(f) for f in factors["w"]] == [kind]
    assert all([type(f) for f in factors[name]] == [Dense] for name in factors if name == "b")


GEOMETRIES = {
    "same, even kernel": Geometry(F.conv2d, (6, 5), 3, (4, 3, 2, 4), 4, {"padding": "same", "groups": 1}),
    "stride and dilation": Geometry(F.conv2d, (9, 8), 3, (4, 3, 3, 2), 4, {"stride": 2, "dilation": 2, "padding": 1}),
    "depthwise": Geometry(F.conv2d, (7, 7), 6, (6, 1, 3, 3), 6, {"padding": 1, "groups": 6}),
    "transposed": Geometry(F.conv_transpose2d, (4, 5), 3, (3, 4, 3, 3), 4, {"stride": 2, "output_padding": 1}),
    "transposed, more windows than positions": Geometry(
        F.conv_transpose1d, (5,), 2, (2, 3, 2), 3, {"stride": 1, "dilation": 3, "output_padding": 2}
    ),
    "volume": Geometry(F.conv3d, (4, 5, 4), 2, (3, 2, 2, 2, 2), 3, {"stride": (1, 2, 1)}),
}


@uneven
@pytest.mark.parametrize("name", GEOMETRIES)
def test_float32(name, device):
    model_fn, params, batch = built(GEOMETRIES[name], torch.float32, device)
    train, val = batch(3, 1), batch(2, 2)
    in_double = built(GEOMETRIES[name], torch.float64, device)
    g, v = (per_sample_grads(in_double[0], in_double[1], in_double[2](k, seed)) for k, seed in ((3, 1), (2, 2)))
    for schedule in ("joint", "two-phase"):
        result = gf.value_and_grad_dot(model_fn, params, train, val, schedule=schedule)
        assert_dots(result.dots, expected("train", g, v), 1e-5, name)
        assert_grads(result.grads, mean(g), 1e-5, name)


@pytest.mark.parametrize("name", ["stride and dilation", "transposed", "depthwise"])
@pytest.mark.parametrize("how", ["stacked", "frames first", "shuffled"])
def test_images_that_are_not_samples(name, how):
    """Samples convolved one at a time, without a batch dimension; images of a sample apart, or shuffled."""
    geometry = GEOMETRIES[name]

    def model_fn(p: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        x = batch["x"] * p["before"]
        if how == "stacked":
            out = torch.stack([geometry.func(row.tanh(), p["w"], p["b"], **geometry.settings) for row in x])
        else:  # two frames of each sample, [2 * B, C, *L]
            frames = torch.cat([x.tanh(), x.flip(2).sin()])
            order = torch.randperm(len(frames), generator=torch.Generator().manual_seed(len(frames)))
            frames = frames[order] if how == "shuffled" else frames
            out = geometry.func(frames, p["w"], p["b"], **geometry.settings)
            out = out[order.argsort()] if how == "shuffled" else out
            out = out.view(2, len(x), *out.shape[1:]).transpose(0, 1)
        return squared(out.tanh(), batch["y"].view(-1, *[1] * (out.dim() - 1)))

    _, params, batch = built(geometry, torch.float64, CPU)
    check(model_fn, params, batch(3, 1), batch(2, 2))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_torch_convolution(transposed, groups):
    """The operator under all of them, whose settings are arguments; samples are found by a probe where not followed."""
    weight = (4, 6 // groups, 3) if transposed else (6, 4 // groups, 3)

    def convolution(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.convolution(x, w, b, [2], [1], [1], transposed, [1 if transposed else 0], groups)

    model_fn, params, batch = built(Geometry(convolution, (9,), 4, weight, 6, {}), torch.float64, CPU)
    check(model_fn, params, batch(3, 1), batch(2, 2))


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_padding_modes_are_followed(mode, dims):
    """They arrive as `pad` and a convolution without padding; no second backward is needed to tell samples apart."""
    module = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[dims - 1](2, 3, 3, padding=1, padding_mode=mode)
    model_fn, params = gf.functionalize(
        module.double(), lambda out, batch: squared(out.tanh(), batch[1].view(-1, *[1] * (dims + 1)))
    )

    def batch(n: int, seed: int) -> tuple[Tensor, Tensor]:
        draw = Draw(torch.float64, CPU, seed)
        return draw.normal(n, 2, *(4, 3, 5)[:dims]), draw.normal(n)

    check(model_fn, params, batch(3, 1), batch(2, 2))
    plan = gf.explain(model_fn, params, batch(3, 1), batch(2, 2))
    assert plan.probe == ""
    assert [use.factor for use in plan.uses["weight"]] == ["Outer"]


def test_activations_are_ordered_as_the_kernel():
    """`a` is `[B, positions, C_in * kh * kw]` in the weight's order: the windows of torch's own `unfold`."""
    geometry = GEOMETRIES["stride and dilation"]
    model_fn, params, batch = built(geometry, torch.float64, CPU)
    data = batch(3, 1)
    (factor,) = gf.ghost_factors(model_fn, params, data)[1]["w"]
    windows = F.unfold((data["x"] * params["before"]).tanh(), (3, 2), dilation=2, padding=1, stride=2)
    assert torch.equal(factor.a, windows.transpose(1, 2))
    assert factor.g.shape == (3, windows.shape[2], 4)
    assert not factor.transposed


def test_a_kernel_used_forward_and_transposed():
    """A tied autoencoder: both uses are `[p, q]` of the same weight, and their cross terms belong to the products."""

    def model_fn(p: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        code = F.conv2d(batch["x"], p["w"], p["b"], stride=2).tanh()
        again = F.conv_transpose2d(code, p["w"], stride=2)
        return squared(again.tanh(), batch["y"].view(-1, 1, 1, 1))

    def batch(n: int, seed: int) -> dict[str, Tensor]:
        draw = Draw(torch.float64, CPU, seed)
        return {"x": draw.normal(n, 3, 7, 5), "y": draw.normal(n)}

    params = Draw(torch.float64, CPU).params(w=(4, 3, 3, 3), b=(4,))
    factors = check(model_fn, params, batch(3, 1), batch(2, 2))
    assert [(type(f), f.transposed) for f in factors["w"]] == [(Outer, False), (Outer, True)]


def test_a_direction_is_seen_as_a_matrix():
    for name in ("volume", "transposed", "depthwise"):
        model_fn, params, batch = built(GEOMETRIES[name], torch.float64, CPU)
        direction = Draw(torch.float64, CPU, 3).params(**{k: tuple(p.shape) for k, p in params.items()})
        want = dots(per_sample_grads(model_fn, params, batch(3, 1)), direction)
        assert_dots(gf.ghost_grad_along(model_fn, params, batch(3, 1), direction), want, 1e-10, name)


@pytest.mark.parametrize("name", ["stride and dilation", "transposed", "depthwise"])
def test_products_are_functions_that_have_derivatives(name):
    """The gradient of the products with respect to the images, and `vmap` over an ensemble of kernels."""
    model_fn, params, batch = built(GEOMETRIES[name], torch.float64, CPU)
    train, val = batch(3, 1), batch(2, 2)

    def by_loop(p: dict[str, Tensor], x: Tensor) -> Tensor:
        def gradient(row: Tensor, y: Tensor) -> dict[str, Tensor]:
            return torch.func.grad(lambda q: model_fn(q, {"x": row[None], "y": y[None]})[0])(p)

        direction = torch.func.grad(lambda q: model_fn(q, val).mean())(p)
        grads = [gradient(row, y) for row, y in zip(x, train["y"], strict=True)]
        return torch.stack([torch.cat([(g[k] * direction[k]).flatten() for k in g]).sum() for g in grads])

    def by_us(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return gf.ghost_grad_dot(model_fn, p, {"x": x, "y": train["y"]}, val)

    ours, wanted = (torch.func.grad(lambda x, f=f: f(params, x).square().sum())(train["x"]) for f in (by_us, by_loop))
    assert_grads({"x": ours}, {"x": wanted}, 1e-10, name)
    ensemble = {k: torch.stack([p, 1.2 * p, -p]) for k, p in params.items()}
    ours, wanted = (torch.func.vmap(f, (0, None))(ensemble, train["x"]) for f in (by_us, by_loop))
    assert_grads({"dots": ours}, {"dots": wanted}, 1e-10, name)


@pytest.mark.parametrize("transposed", [False, True])
def test_large_groups_have_outer_products_of_their_own(transposed, monkeypatch):
    """Groups with more channels than positions, their gradients above the budget: rows are fewer than gradients."""
    weight = (12, 5, 2) if transposed else (10, 6, 2)
    func = F.conv_transpose1d if transposed else F.conv1d
    geometry = Geometry(func, (3,), 12, weight, 10, {"groups": 2, "stride": 2})
    model_fn, params, batch = built(geometry, torch.float64, CPU)
    whole = gf.explain(model_fn, params, batch(3, 1)).uses
    assert [(use.factor, use.derived) for use in whole["w"]] == [("Dense", False)]
    monkeypatch.setattr("ghostfunc._rules_conv._DENSE_BYTES", 0)
    apart = gf.explain(model_fn, params, batch(3, 1)).uses
    assert [(use.factor, use.derived) for use in apart["w"]] == [("Outer", True)] * 2
    check(model_fn, params, batch(3, 1), batch(2, 2))


@pytest.mark.parametrize("name", ["stride and dilation", "transposed", "depthwise"])
def test_autocast(name):
    """Factors are those of the bfloat16 operation: its windows, and products in float32."""
    geometry = GEOMETRIES[name]
    plain, params, batch = built(geometry, torch.float32, CPU)

    def model_fn(p: dict[str, Tensor], data: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return plain(p, data)

    train, val = batch(3, 1), batch(2, 2)
    g, v = per_sample_grads(model_fn, params, train), per_sample_grads(model_fn, params, val)
    result = gf.value_and_grad_dot(model_fn, params, train, val)
    assert_dots(result.dots, expected("train", g, v), 2e-2, name)
    assert_grads(result.grads, mean(g), 2e-2, name)
    factor = gf.ghost_factors(model_fn, params, train)[1]["w"][0]
    if isinstance(factor, Outer):
        assert factor.a.dtype == torch.float32
        assert torch.equal(factor.a, factor.a.bfloat16().float())


def test_doubles_under_autocast_stay_doubles():
    """Autocast leaves float64 alone, and so do the rules."""
    plain, params, batch = built(GEOMETRIES["stride and dilation"], torch.float64, CPU)

    def model_fn(p: dict[str, Tensor], data: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return plain(p, data)

    check(model_fn, params, batch(3, 1), batch(2, 2))


# --- cost -------------------------------------------------------------------------------------------------------------


def backward_flops(
    g, x, w, bias, stride, padding, dilation, transposed, more, groups, mask, out_shape=None, **_
) -> int:
    """The products of a convolution's backward; torch's own count leaves out that groups do not meet."""
    product = conv_flop_count(list(x), list(w), list(g), transposed)
    return product * (mask[0] + mask[1])


def flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: backward_flops}
    ) as counter:
        run()
    return counter.get_total_flops()


LAYERS: list[tuple[Callable[..., Tensor], tuple[int, ...], dict[str, Any]]] = [
    (F.conv2d, (16, 3, 3, 3), {"padding": 1}),
    (F.conv2d, (16, 1, 5, 5), {"padding": 2, "groups": 16}),
    (F.conv2d, (24, 16, 3, 3), {"padding": 1, "stride": 2}),
    (F.conv_transpose2d, (24, 8, 2, 2), {"stride": 2}),
]


@pytest.mark.parametrize("schedule", ["joint", "two-phase"])
@pytest.mark.parametrize(("n", "m"), [(4, 1), (3, 3)])
def test_dots_cost_the_concatenated_batch(schedule, n, m):
    """As many products as a plain step on train and val rows, and at most 2% more for the passes over tiles."""

    def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        for k, (func, _, how) in enumerate(LAYERS):
            x = func(x, p[f"w{k}"], p[f"b{k}"], **how).tanh()
        return x.flatten(1).sum(1)

    widths = (16, 16, 24, 8)
    shapes = {f"w{k}": shape for k, (_, shape, _) in enumerate(LAYERS)} | {f"b{k}": (c,) for k, c in enumerate(widths)}
    params = Draw(torch.float32, CPU).params(**shapes)
    train, val = (Draw(torch.float32, CPU, seed).normal(k, 3, 24, 24) for k, seed in ((n, 1), (m, 2)))
    positions = (24 * 24, 24 * 24, 12 * 12, 12 * 12)
    products = [2 * (n + m) * where * prod(shape) for where, (_, shape, _) in zip(positions, LAYERS, strict=True)]
    plain = 3 * sum(products) - products[0]  # the first layer's input has no gradient
    assert flops(lambda: plain_step(model_fn, params, torch.cat([train, val]))) == plain
    counted = flops(lambda: gf.value_and_grad_dot(model_fn, params, train, val, schedule=schedule))
    assert plain <= counted <= 1.02 * plain


@pytest.mark.parametrize("schedule", ["joint", "two-phase"])
def test_no_per_sample_kernel_is_allocated(schedule):
    """The largest tensor is a tile, far below `[B, C_out, C_in * kh * kw]`."""
    n, m, channels = 96, 2, 128  # ninety-six kernels of 0.6 MB
    geometry = Geometry(F.conv2d, (3, 3), channels, (channels, channels, 3, 3), 0, {"padding": 1})
    model_fn, params, batch = built(geometry, torch.float32, CPU)
    with Allocations() as recorded:
        gf.value_and_grad_dot(model_fn, params, batch(n, 1), batch(m, 2), schedule=schedule)
    tile = (16 << 20) // 4
    assert params["w"].numel() <= recorded.largest <= tile < n * params["w"].numel() / 3
    assert [type(f) for f in gf.ghost_factors(model_fn, params, batch(2, 1))[1]["w"]] == [Outer]


def test_windows_do_not_outlive_the_backward_of_their_layer():
    """The forward keeps images, not windows: nothing as large as the windows exists until the backward."""
    geometry = Geometry(F.conv2d, (16, 16), 8, (8, 8, 5, 5), 0, {"padding": 2})
    model_fn, params, batch = built(geometry, torch.float32, CPU)
    windows = 6 * 16 * 16 * 8 * 25
    with Allocations(large=windows // 2) as recorded:
        gf.value_and_grad_dot(model_fn, params, batch(4, 1), batch(2, 2))
    assert recorded.large_storages  # the windows were seen
    alive = recorded.large_alive_at
    assert max(alive["tanh"]) == 0
    assert max(alive["tanh_backward"]) == 0
