"""`functionalize` and the ready losses."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ghostfunc as gf


class Tied(nn.Module):
    """An embedding that is the head, a frozen layer, a buffer that counts calls."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, input_ids: Tensor, shift: Tensor | None = None) -> Tensor:
        """Logits."""
        self.calls += 1
        h = self.frozen(self.table(input_ids)).tanh()
        return self.head(h if shift is None else h + shift)


def test_params_are_the_trainable_ones_tied_once_and_share_memory():
    module = Tied()
    _, params = gf.functionalize(module, gf.causal_lm_loss)
    assert list(params) == ["table.weight"]
    assert not params["table.weight"].requires_grad
    assert params["table.weight"].data_ptr() == module.table.weight.data_ptr()


def test_tied_weights_are_swapped_together():
    module = Tied()
    model_fn, params = gf.functionalize(module, gf.causal_lm_loss)
    ids = torch.randint(7, (3, 5))
    other = {"table.weight": 2 * params["table.weight"]}
    with torch.no_grad():
        h = module.frozen(F.embedding(ids, other["table.weight"])).tanh()
        want = gf.causal_lm_loss(h @ other["table.weight"].T, {"input_ids": ids})
        torch.testing.assert_close(model_fn(other, {"input_ids": ids}), want)


def test_buffers_and_parameters_are_as_before():
    module = Tied()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    model_fn, params = gf.functionalize(module, gf.causal_lm_loss)
    model_fn({name: 2 * p for name, p in params.items()}, {"input_ids": torch.randint(7, (3, 5))})
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    assert module.head.weight is module.table.weight


@pytest.mark.parametrize("kind", ["dict", "dict with labels", "tuple", "tensor", "call"])
def test_how_a_batch_becomes_arguments(kind):
    module = Tied()
    ids, shift = torch.randint(7, (3, 5)), torch.randn(3, 5, 4)
    batch, call, want = {
        "dict": ({"input_ids": ids, "shift": shift}, None, (ids, shift)),
        "dict with labels": ({"input_ids": ids, "labels": ids.flip(0)}, None, (ids,)),
        "tuple": ((ids, shift, ids), None, (ids, shift)),
        "tensor": (ids, None, (ids,)),
        "call": ({"x": ids, "labels": ids}, lambda m, b: m(b["x"].flip(1)), (ids.flip(1),)),
    }[kind]
    model_fn, params = gf.functionalize(module, gf.causal_lm_loss, call=call)
    with torch.no_grad():
        torch.testing.assert_close(model_fn(params, batch), gf.causal_lm_loss(module(*want), batch))


def test_an_optimizer_step_is_seen_by_the_next_call():
    module = Tied()
    model_fn, params = gf.functionalize(module, gf.causal_lm_loss)
    ids = torch.randint(7, (3, 5))
    before = model_fn(params, ids)
    with torch.no_grad():
        module.table.weight.mul_(2)
    assert not torch.equal(model_fn(params, ids), before)


def test_causal_lm_loss_is_each_samples_own_mean():
    logits, ids = torch.randn(3, 5, 7, dtype=torch.float64), torch.randint(7, (3, 5))
    labels = ids.clone()
    labels[0, 2] = labels[1] = -100
    for batch in ({"input_ids": ids, "labels": labels}, (ids, labels), labels):
        losses = gf.causal_lm_loss(logits, batch)
        want = F.cross_entropy(logits[0, [0, 2, 3]], labels[0, [1, 3, 4]])
        torch.testing.assert_close(losses[0], want, rtol=1e-12, atol=1e-12)
        assert losses[1] == 0
        torch.testing.assert_close(losses[2], F.cross_entropy(logits[2, :-1], ids[2, 1:]), rtol=1e-12, atol=1e-12)


def test_causal_lm_loss_without_labels_leaves_out_the_padding():
    logits, ids = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    losses = gf.causal_lm_loss(logits, {"input_ids": ids, "attention_mask": mask})
    torch.testing.assert_close(losses[0], F.cross_entropy(logits[0, :2], ids[0, 1:3]))
    torch.testing.assert_close(losses[1], F.cross_entropy(logits[1, :-1], ids[1, 1:]))


def test_causal_lm_loss_equals_the_models_own(device):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=19, n_positions=8, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    module = GPT2LMHeadModel(config).to(device).eval()
    ids = torch.randint(19, (1, 8), device=device)
    with torch.no_grad():
        want = module(input_ids=ids, labels=ids).loss
        model_fn, params = gf.functionalize(module, gf.causal_lm_loss)
        torch.testing.assert_close(model_fn(params, {"input_ids": ids})[0], want)


def test_low_precision_logits_give_float32_losses():
    logits, labels = torch.randn(2, 5, 7).bfloat16(), torch.randint(7, (2, 5))
    assert gf.causal_lm_loss(logits, labels).dtype == torch.float32


def test_classification_loss():
    logits, labels = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, -100, 2, 1])
    for batch in ((None, labels), {"labels": labels}):
        losses = gf.classification_loss(logits, batch)
        assert losses[1] == 0
        torch.testing.assert_close(losses, F.cross_entropy(logits, labels, reduction="none"), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"(?s)\(3,\).*\(4, 3\)"):
        gf.classification_loss(logits, (None, labels[:3]))
