"""`plan_step` and `explain --fake`: what fake tensors say is what real ones do."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import as_json, complaint, run
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import ghostfunc as gf
from ghostfunc import _planning
from ghostfunc._allocations import Allocations, Span, at_peak
from ghostfunc._fake import new_mode
from ghostfunc._planning import StepPlan, plan_step
from ghostfunc.cli._fake_models import PUBLISHED, build, config_of, fake_step

VOCABULARY, LENGTH = 301, 24
SIZES = {
    "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": LENGTH},
    "llama": {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32,
              "intermediate_size": 80, "max_position_embeddings": LENGTH},
}  # fmt: skip
Work = tuple[Any, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]


def config(kind: str) -> Any:
    from transformers import AutoConfig

    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0) if kind == "gpt2" else {}
    return AutoConfig.for_model(kind, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **SIZES[kind], **dropouts)


def work(kind: str, dtype: torch.dtype = torch.float32, *, fake: bool, checkpointed: bool = False) -> Work:
    mode = new_mode() if fake else None
    module = build(config(kind), dtype, mode=mode, checkpointed=checkpointed)
    model_fn, params = gf.functionalize(module, gf.causal_lm_loss)
    train, val = ({"input_ids": torch.randint(VOCABULARY, (k, LENGTH))} for k in (4, 2))
    return model_fn, params, train, val


def planned(kind: str, dtype: torch.dtype = torch.float32, **how: Any) -> StepPlan:
    return plan_step(*work(kind, dtype, fake=True), **how)


KINDS = pytest.mark.parametrize("kind", SIZES)


@KINDS
def test_a_fake_model_has_the_plan_of_the_real_one(kind: str) -> None:
    fake, real = (work(kind, fake=fake) for fake in (True, False))
    for schedule in ("joint", "two-phase"):
        assert gf.explain(*fake, schedule=schedule) == gf.explain(*real, schedule=schedule)
    plan = plan_step(*fake)
    assert plan.parameter_bytes == sum(p.numel() * p.element_size() for p in real[1].values())
    assert plan.flops == gf.explain(*real, schedule="two-phase").total_flops
    assert plan.memory(moments=0) == plan_step(*real).memory(moments=0)


@KINDS
def test_meta_parameters_are_followed(kind: str) -> None:
    model_fn, params, train, val = work(kind, fake=False)
    module = build(config(kind), torch.float32).to("meta")
    module.tie_weights()  # it was taken apart by the move
    on_meta, meta = gf.functionalize(module, gf.causal_lm_loss)
    batches = ({name: t.to("meta") for name, t in batch.items()} for batch in (train, val))
    train_on_meta, val_on_meta = batches
    assert gf.explain(on_meta, meta, train_on_meta, val_on_meta) == gf.explain(model_fn, params, train, val)
    found, expected = plan_step(on_meta, meta, train_on_meta, val_on_meta), plan_step(model_fn, params, train, val)
    assert found.memory(3, sharded=True) == expected.memory(3, sharded=True)


class Kept:
    """The storages that autograd keeps of a forward, by what its hooks are given."""

    def __init__(self, params: dict[str, Tensor]) -> None:
        self.own = {p.untyped_storage()._cdata for p in params.values()}
        self.sizes: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.own:
            self.sizes[storage._cdata] = storage.nbytes()
        return tensor


@KINDS
def test_activations_are_what_autograd_saves(kind: str) -> None:
    """Of a plain forward: the bytes that a fake one leaves are those that hooks see a real one save."""
    model_fn, params, train, _ = work(kind, fake=False)
    leaves = {name: p.requires_grad_() for name, p in params.items()}
    kept = Kept(leaves)
    with saved_tensors_hooks(kept.pack, lambda t: t):
        losses = model_fn(leaves, train)
    fake_fn, fakes, batch, _ = work(kind, fake=True)
    mode = next(iter(fakes.values())).fake_mode  # type: ignore[attr-defined]
    with mode, Allocations() as record:
        fake_leaves = {name: p.requires_grad_() for name, p in fakes.items()}
        batch = {name: mode.from_tensor(t) for name, t in batch.items()}
        fake_losses = fake_fn(fake_leaves, batch)
        left = [a.bytes for a in record.made if a.alive(record.clock)]
    outputs = losses.numel() * losses.element_size()
    assert fake_losses.shape == losses.shape
    ids = sum(t.numel() * t.element_size() for t in train.values())  # inputs, made outside of the record
    assert abs(sum(left) - outputs - sum(kept.sizes.values())) <= ids


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_record_of_a_fake_step_is_that_of_a_real_one(kind: str, dtype: torch.dtype) -> None:
    """The same operations on real tensors hold the same bytes at their peak, but for tiles inside of one operation."""
    plan = planned(kind, dtype)
    model_fn, params, train, val = work(kind, dtype, fake=False)
    with Allocations() as record:
        first = gf.val_gradient(model_fn, params, val)
        second = gf.value_and_grad_dot(model_fn, params, train, first)
    real = sum(at_peak(Span("", a.bytes, a.born, a.died) for a in record.made).values())
    memory = plan.memory(moments=0)
    fake = memory.total - memory.parameters
    tile = plan.memory(moments=0).working
    print(f"{kind} {dtype}: {real} bytes really, {fake} by the plan")
    assert real <= fake <= 1.05 * real + tile
    assert second.dots.shape == (4,)


def test_checkpointing_leaves_less_and_computes_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_planning, "_KEPT_WHOLE", 0)
    plain = planned("llama")
    less = plan_step(*work("llama", fake=True, checkpointed=True))
    assert less.activation_bytes < 0.6 * plain.activation_bytes
    assert plain.again_flops == 0 < less.again_flops < plain.plain_flops * 6 / 4 / 3
    model_fn, params, train, val = work("llama", fake=False, checkpointed=True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        gf.value_and_grad_dot(model_fn, params, train, gf.val_gradient(model_fn, params, val))
    assert counter.get_total_flops() == pytest.approx(less.flops, rel=0.01)
    assert less.traffic(4, sharded=True) > plain.traffic(4, sharded=True)


@KINDS
def test_shards(kind: str) -> None:
    """A rank of N has 1/N of parameters and moments, whole activations, and one weight whole at a time."""
    plan = planned(kind, vocabulary=VOCABULARY)
    one = plan.memory()
    assert one.gathered == 0 and one.optimizer == 2 * one.parameters == 2 * plan.parameter_bytes
    assert one.logits > 0
    previous = one.total
    for ranks in (8, 64):
        memory = plan.memory(ranks, sharded=True)
        assert memory.parameters == math.ceil(plan.parameter_bytes / ranks)
        assert memory.gathered == 4 * VOCABULARY * 32
        assert memory.total < previous
        assert plan.memory(ranks) == one
        previous = memory.total
    blocks = plan.memory(8, sharded=True, blocks_of_logits=True)
    assert blocks.logits == 0


def test_traffic_by_hand() -> None:
    """One linear map of 2^17 numbers: two gathers a phase, one for the direction, two reduce-scatters, of which 3/4."""
    module = torch.nn.Linear(256, 512, bias=False)
    model_fn, params = gf.functionalize(module, gf.classification_loss)
    batch = (torch.randn(3, 256), torch.tensor([0, 1, 2]))
    plan = plan_step(model_fn, params, batch, batch)
    weight = 4 * 256 * 512
    assert plan.traffic(4, sharded=True) == (2 * 2 + 1 + 2) * weight * 3 // 4
    assert plan.traffic(4) == 2 * 2 * weight * 3 // 4
    assert plan.traffic(1) == 0
    seconds = plan.seconds(4, sharded=True, flops=1e6, bandwidth=1e6)
    assert seconds.total == pytest.approx(plan.flops / 1e6 + plan.traffic(4, sharded=True) / 1e6)


def test_the_peak_of_spans() -> None:
    """What an operation takes is there while it makes its result."""
    spans = [Span("a", 5, 1, 3), Span("b", 7, 3, 4), Span("a", 2, 4), Span("c", 1)]
    assert at_peak(spans) == {"a": 5, "b": 7, "c": 1}


def test_a_published_size() -> None:
    params = fake_step("gpt2", torch.float32, (1, 1), 8)[1]
    assert sum(p.numel() for p in params.values()) == 124_439_808


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parameters"),
    [("gpt2-xl", 1_557_611_200), ("llama-3-8b", 8_030_261_248), ("llama-3-70b", 70_553_706_496)],
)
def test_large_models_are_planned_in_a_minute_or_so(name: str, parameters: int) -> None:
    start = time.perf_counter()
    model_fn, params, train, val, vocabulary = fake_step(name, torch.bfloat16, (1, 1), 1024)
    plan = plan_step(model_fn, params, train, val, vocabulary=vocabulary)
    taken = time.perf_counter() - start
    print(f"{name}: {taken:.0f} s")
    assert plan.parameters == parameters
    tokens = 1024 * 6 * parameters
    assert plan.plain_flops == pytest.approx(tokens, rel=0.15)
    assert taken < 300


# ---------------------------------------------------------------- the command


def test_the_command(tmp_path: Any) -> None:
    config("llama").save_pretrained(tmp_path)
    flags = ("--fake", tmp_path, "--batch-size", 4, "--block-size", LENGTH, "--ranks", 4, "--shard")
    told = as_json("explain", *flags, "--tflops", 1, "--bandwidth", 2)
    assert told["ranks"] == 4 and told["sharded"] and told["memory"]["total"] > told["memory"]["activations"]
    assert told["flops"]["dots"] > told["flops"]["plain"] > 0
    assert told["seconds"]["communication"] == pytest.approx(told["bytes_sent"] / 2e9)
    json.dumps(told)
    shown = run("explain", *flags).stdout
    assert "sharded over 4 ranks" in shown and "total" in shown and "modelled" not in shown
    assert "config.json" in complaint("explain", "--fake", tmp_path / "nothing")
    assert "--layers" in complaint("explain", "--fake", "gpt2", "--layers", "mlp")
    assert "none of float32" in complaint("explain", "--fake", "gpt2", "--model-dtype", "int8")


def test_every_published_config_is_known() -> None:
    for name, (kind, _) in PUBLISHED.items():
        assert config_of(name).model_type == kind


def test_the_page_is_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """No number on docs/planning.md was typed."""
    root = Path(__file__).parent.parent
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    monkeypatch.delitem(sys.modules, "planning", raising=False)
    import planning  # pyright: ignore[reportMissingImports]

    results = json.loads(planning.RESULTS.read_text(encoding="utf-8"))
    assert planning.page(results) == planning.PAGE.read_text(encoding="utf-8")
    for checked in results["steps"].values():
        flops, peak = checked["flops"], checked["peak"]
        assert flops["predicted"] == pytest.approx(flops["measured"], rel=0.01)
        assert peak["predicted"] == pytest.approx(peak["measured"], rel=0.15)
