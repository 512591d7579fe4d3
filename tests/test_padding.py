"""A sample's numbers depend on the sample alone: not on its neighbours, on how far it is padded, or with what.

The reference is each text by itself without any padding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from cases import Built, Draw, functionalized
from oracle import assert_dots, assert_grads, dots, matrix, mean, per_sample_grads
from torch import Tensor
from zoo import ZooCase, in_double
from zoo_others import GPT2, SMALL, T5, VOCABULARY, pretrained, token_loss

import ghostfunc as gf

Text = dict[str, Tensor]

CPU = torch.device("cpu")
LENGTHS = (5, 2, 6, 1, 4)
TOLERANCE = 1e-9


class Model(NamedTuple):
    """A model and how its texts are made.

    Attributes:
        kind: the model's class.
        config: its configuration's class.
        options: its configuration.
        loss: the loss of each sample.
        text: draws one text `{name: [L]}` of a length.
        sides: where it can be padded.
    """

    kind: str
    config: str
    options: dict[str, Any]
    loss: Any
    text: Callable[[Draw, int], Text]
    sides: tuple[str, ...] = ("left", "right")


def bare(draw: Draw, length: int) -> Text:
    """Ids and their mask; the targets are the ids."""
    return {"input_ids": draw.ids(VOCABULARY, length), "attention_mask": torch.ones(length, dtype=torch.long)}


def placed(draw: Draw, length: int) -> Text:
    """The same with positions, which models with learned positions need where they are padded on the left."""
    return {**bare(draw, length), "position_ids": torch.arange(length)}


def labelled(draw: Draw, length: int) -> Text:
    """With a label for each token but the first, which nothing predicts."""
    text = placed(draw, length)
    return {**text, "labels": text["input_ids"].index_fill(0, torch.tensor([0]), -100)}


def masked(draw: Draw, length: int) -> Text:
    """With a label at every second token."""
    labels = draw.ids(VOCABULARY, length)
    labels[1::2] = -100
    return {**placed(draw, length), "labels": labels}


def classified(draw: Draw, length: int) -> Text:
    return {**bare(draw, length), "labels": draw.ids(2, 1)[0]}


def translated(draw: Draw, length: int) -> Text:
    """A source, and a target of as many tokens as the source has."""
    target = bare(draw, length)
    return {
        **bare(draw, length),
        "decoder_input_ids": target["input_ids"],
        "decoder_attention_mask": target["attention_mask"],
        "labels": draw.ids(VOCABULARY, length),
    }


BERT = {**SMALL, "num_hidden_layers": 1}
LLAMA = {**BERT, "num_key_value_heads": 1, "use_cache": False}
EAGER = {"attn_implementation": "eager"}
MODELS = {
    "bert": Model("BertForSequenceClassification", "BertConfig", BERT, gf.classification_loss, classified, ("right",)),
    "bert masked": Model("BertForMaskedLM", "BertConfig", BERT, token_loss, masked),
    "t5": Model("T5ForConditionalGeneration", "T5Config", {**T5, "num_layers": 1}, token_loss, translated),
    "gpt2": Model("GPT2LMHeadModel", "GPT2Config", GPT2, gf.causal_lm_loss, labelled),
    "gpt2 without labels": Model("GPT2LMHeadModel", "GPT2Config", GPT2, gf.causal_lm_loss, placed),
    "llama": Model("LlamaForCausalLM", "LlamaConfig", LLAMA, gf.causal_lm_loss, labelled),
    "llama, eager": Model("LlamaForCausalLM", "LlamaConfig", LLAMA | EAGER, gf.causal_lm_loss, labelled),
    "llama without labels or positions": Model("LlamaForCausalLM", "LlamaConfig", LLAMA, gf.causal_lm_loss, bare),
}
SIDES = pytest.mark.parametrize(
    ("name", "side"), [(name, side) for name, model in MODELS.items() for side in model.sides]
)


def model_of(name: str) -> Built:
    kind, config, options, loss, *_ = MODELS[name]

    def make(dtype: torch.dtype, device: torch.device) -> Built:
        torch.manual_seed(0)
        module = pretrained(kind, config, **options)().eval()
        model_fn, params = functionalized(module, loss, dtype, device)
        return Built(model_fn, params, lambda n, seed: {})

    return in_double(ZooCase(name, make), CPU)


def collated(texts: list[Text], side: str, length: int, fill: int) -> dict[str, Tensor]:
    """Texts as a batch `[n, length]`: masks end, labels are ignored, and any id may stand where nothing looks."""
    filler = Draw(torch.float64, CPU, fill)
    batch = {}
    for key, value in texts[0].items():
        rows = [text[key] for text in texts]
        if value.dim() > 0:
            before = {"attention_mask": 0, "decoder_attention_mask": 0, "labels": -100, "position_ids": 0}
            rows = [_padded(row, side, length, before.get(key), filler) for row in rows]
        batch[key] = torch.stack(rows)
    return batch


def _padded(row: Tensor, side: str, length: int, value: int | None, filler: Draw) -> Tensor:
    missing = length - len(row)
    padding = filler.ids(VOCABULARY, missing) if value is None else torch.full((missing,), value)
    return torch.cat([row, padding] if side == "right" else [padding, row])


@pytest.fixture(scope="module")
def references() -> dict[str, Any]:
    """Each model with its texts, their gradients one by one without padding, and a direction."""
    found = {}
    for name, model in MODELS.items():
        built = model_of(name)
        draw = Draw(torch.float64, CPU, seed=9)
        texts = [model.text(draw, length) for length in LENGTHS]
        each = [
            per_sample_grads(built.model_fn, built.params, collated([t], "right", len(t["input_ids"]), 0))
            for t in texts
        ]
        grads = {key: torch.cat([g[key] for g in each]) for key in built.params}
        found[name] = (built, texts, grads)
    return found


def part(grads: dict[str, Tensor], samples: list[int]) -> dict[str, Tensor]:
    return {name: g[samples] for name, g in grads.items()}


@SIDES
@pytest.mark.parametrize("length", [6, 9])
def test_as_without_padding(references, name, side, length):
    """In any company, padded to any length, with any ids in the padding."""
    (model_fn, params, _), texts, grads = references[name]
    direction = mean(grads)
    for fill, samples in enumerate(([0, 1, 2, 3, 4], [4, 1, 0], [1, 1, 3, 2])):
        batch = collated([texts[i] for i in samples], side, length, fill)
        found = gf.ghost_grad_along(model_fn, params, batch, direction)
        assert_dots(found, dots(part(grads, samples), direction), TOLERANCE, f"{samples} in {length}")


@SIDES
@pytest.mark.parametrize("schedule", ["joint", "two-phase"])
def test_pairs_and_gradients_of_padded_texts(references, name, side, schedule):
    """Train and val batches that are padded, in two-phase to other lengths."""
    (model_fn, params, _), texts, grads = references[name]
    g, v = part(grads, [0, 1, 2, 3]), part(grads, [4, 2])
    train = collated([texts[i] for i in (0, 1, 2, 3)], side, 7, 1)
    val = collated([texts[i] for i in (4, 2)], side, 7 if schedule == "joint" else 8, 2)
    found = gf.value_and_grad_dot(model_fn, params, train, val, schedule=schedule)
    assert_dots(found.dots, dots(g, mean(v)), TOLERANCE, schedule)
    whole = {"all": torch.cat([t.flatten() for t in found.grads.values()])}
    assert_grads(whole, {"all": torch.cat([t.flatten() for t in mean(g).values()])}, TOLERANCE, schedule)
    pairs = gf.ghost_grad_dot(model_fn, params, train, val, schedule=schedule, out="train val")
    assert_dots(pairs, matrix(g, v), TOLERANCE, schedule)


@SIDES
def test_a_text_of_padding_alone(references, name, side):
    """A text without a target has loss 0 and gradient 0, and its neighbours have theirs."""
    (model_fn, params, _), texts, grads = references[name]
    if "labels" in texts[3] and (texts[3]["labels"] != -100).any():
        pytest.skip("every text of this model has a target")
    batch = collated([texts[i] for i in (0, 3, 2)], side, 6, 0)
    result = gf.value_and_grad_dot(model_fn, params, batch, batch)
    assert result.losses[1] == 0
    assert result.dots[1] == 0
    expected = part(grads, [0, 3, 2])
    assert_dots(result.dots, dots(expected, mean(expected)), TOLERANCE, "with a text of padding alone")
