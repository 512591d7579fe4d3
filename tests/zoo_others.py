"""The zoo's encoders, encoder-decoders, vision, audio and LoRA models of transformers and peft; and what is refused.

All are tiny and random, built from their configurations. Texts are padded: on the right, each sample by its own
length. `OTHERS` are these and the plain modules of `zoo_modules`; `REFUSED` are samples that interact.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers
from cases import Built, Draw, functionalized
from torch import Tensor, nn
from zoo import ZooCase
from zoo_modules import MODULES, module_case, move_statistics

import ghostfunc as gf

Batch = dict[str, Tensor]
BatchOf = Callable[[Draw, int], Batch]

VOCABULARY, LENGTH = 23, 6
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 16, "pad_token_id": 1,
}  # fmt: skip
KEYS = ("key.bias", "k_proj.bias", "k_lin.bias")  # the softmax takes away what a key's bias adds to every score
VISION: dict[str, Any] = {**SMALL, "image_size": 8, "patch_size": 4}


def model_case(
    name: str,
    build: Callable[[], nn.Module],
    loss: Any,
    batch_of: BatchOf,
    call: Any = None,
    *,
    zero: tuple[str, ...] = KEYS,
    padding: str = "right",
    train: bool = False,
) -> ZooCase:
    """A case of a module, in eval mode unless `train`, with a batch drawn by `batch_of(draw, n)`."""

    def make(dtype: torch.dtype, device: torch.device) -> Built:
        torch.manual_seed(0)
        module = build().train(train)
        move_statistics(module)
        model_fn, params = functionalized(module, loss, dtype, device, call)
        return Built(model_fn, params, lambda n, seed: batch_of(Draw(dtype, device, seed), n))

    return ZooCase(name, make, name.split(" ")[0].rstrip(","), zero, padding)


def pretrained(kind: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """Builds a transformers model from the names of its class and of its configuration's class."""
    return lambda: getattr(transformers, kind)(getattr(transformers, config)(**options))


# --- batches and losses -----------------------------------------------------------------------------------------------


def padded(draw: Draw, n: int, length: int = LENGTH) -> Batch:
    """Ids `[n, T]` and their mask; sample i has `T - i % 4` tokens, and the rest is padding."""
    ids = draw.ids(VOCABULARY, n, length, low=4)
    lengths = length - torch.arange(n, device=ids.device) % 4
    mask = (torch.arange(length, device=ids.device) < lengths[:, None]).long()
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


def classified(draw: Draw, n: int) -> Batch:
    """A padded text with one of two segments for each token, and a class."""
    return {**padded(draw, n), "token_type_ids": draw.ids(2, n, LENGTH), "labels": draw.ids(2, n)}


def masked(draw: Draw, n: int) -> Batch:
    """A padded text with labels at some of its tokens: masked language modelling."""
    batch = padded(draw, n)
    chosen = (draw.ids(2, n, LENGTH) == 1).index_fill(1, torch.tensor([0], device=draw.device), True)
    labels = draw.ids(VOCABULARY, n, LENGTH).masked_fill(~(chosen & (batch["attention_mask"] == 1)), -100)
    return {**batch, "labels": labels}


def translated(draw: Draw, n: int) -> Batch:
    """A padded source, and a target of 5 tokens that is padded as well, each with its label beside it."""
    target = padded(draw, n, 5)
    labels = draw.ids(VOCABULARY, n, 5).masked_fill(target["attention_mask"] == 0, -100)
    return {**padded(draw, n), "decoder_input_ids": target["input_ids"], "labels": labels}


def pictures(draw: Draw, n: int, size: int = 8) -> Batch:
    """Images `[n, 3, size, size]` and classes."""
    return {"pixel_values": draw.normal(n, 3, size, size), "labels": draw.ids(2, n)}


def captioned(draw: Draw, n: int) -> Batch:
    """Images with padded captions that end in the end-of-text token."""
    return {"pixel_values": draw.normal(n, 3, 8, 8), **padded(draw, n)}


def spoken(draw: Draw, n: int) -> Batch:
    """Mel features `[n, 4, 8]` and a transcript of 5 tokens."""
    target = padded(draw, n, 5)
    labels = draw.ids(VOCABULARY, n, 5).masked_fill(target["attention_mask"] == 0, -100)
    return {"input_features": draw.normal(n, 4, 8), "decoder_input_ids": target["input_ids"], "labels": labels}


def conversation(draw: Draw, n: int) -> Batch:
    """A text in which four tokens stand for the four patches of an image."""
    batch = padded(draw, n, 10)
    batch["input_ids"][:, 1:5] = 0
    return {**batch, "pixel_values": draw.normal(n, 3, 8, 8)}


def token_loss(output: Any, batch: Batch) -> Tensor:
    """Mean cross-entropy over each sample's own labels, without a shift."""
    labels = batch["labels"]
    losses = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    return losses.sum(1) / (labels != -100).sum(1)


def tempered_loss(output: Any, batch: Batch) -> Tensor:
    """The classification loss at a temperature: random residual networks have logits in the hundreds."""
    return gf.classification_loss(output.logits / 64, batch)


def replaced_loss(output: Any, batch: Batch) -> Tensor:
    """ELECTRA's: was this token replaced? The mean over each sample's own tokens."""
    mask = batch["attention_mask"]
    target = (batch["input_ids"] % 2).to(output.logits.dtype)
    losses = F.binary_cross_entropy_with_logits(output.logits, target, reduction="none")
    return (losses * mask).sum(1) / mask.sum(1)


def _with_scale(module: Any, batch: Batch) -> tuple[Any, Tensor]:
    return module(**batch), module.logit_scale


def pair_loss(output: tuple[Any, Tensor], batch: Batch) -> Tensor:
    """CLIP's own pair: -log sigmoid(scale * cosine)."""
    embeddings, scale = output
    return F.softplus(-scale.exp() * (embeddings.image_embeds * embeddings.text_embeds).sum(-1))


def contrastive_loss(output: tuple[Any, Tensor], batch: Batch) -> Tensor:
    """CLIP's own loss: the other samples' captions are the negatives."""
    logits = output[0].logits_per_image
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device), reduction="none")


# --- encoders ---------------------------------------------------------------------------------------------------------

DISENTANGLED = {
    **SMALL, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8,
    "type_vocab_size": 2,
}  # fmt: skip
DISENTANGLED_2 = {
    **DISENTANGLED, "position_buckets": 4, "norm_rel_ebd": "layer_norm", "share_att_key": True, "conv_kernel_size": 3,
    "conv_act": "gelu",
}  # fmt: skip


def text_classifier(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A sequence classifier by the model's name."""
    return pretrained(f"{name}ForSequenceClassification", f"{name}Config", **{**SMALL, **options})


ENCODERS = [
    model_case("bert", text_classifier("Bert"), gf.classification_loss, classified),
    model_case("bert eager attention", text_classifier("Bert", attn_implementation="eager"), gf.classification_loss,
               classified),
    model_case("bert masked tied", pretrained("BertForMaskedLM", "BertConfig", **SMALL), token_loss, masked),
    model_case("roberta", text_classifier("Roberta", max_position_embeddings=18, type_vocab_size=2),
               gf.classification_loss, classified),
    model_case("roberta masked tied", pretrained("RobertaForMaskedLM", "RobertaConfig",
                                                 **{**SMALL, "max_position_embeddings": 18}), token_loss, masked),
    model_case("deberta", text_classifier("Deberta", **DISENTANGLED), gf.classification_loss, classified),
    model_case("deberta v2", text_classifier("DebertaV2", **DISENTANGLED_2), gf.classification_loss, classified),
    model_case("deberta v2 masked", pretrained("DebertaV2ForMaskedLM", "DebertaV2Config", **DISENTANGLED), token_loss,
               masked, zero=("pos_key_proj.bias",)),
    model_case("electra", pretrained("ElectraForPreTraining", "ElectraConfig", **SMALL, embedding_size=12),
               replaced_loss, padded),
    model_case("electra generator tied", pretrained("ElectraForMaskedLM", "ElectraConfig", **SMALL, embedding_size=12),
               token_loss, masked),
    model_case("distilbert", pretrained(
        "DistilBertForSequenceClassification", "DistilBertConfig", vocab_size=VOCABULARY, dim=16, n_layers=2, n_heads=2,
        hidden_dim=24, max_position_embeddings=16, pad_token_id=1,
    ), gf.classification_loss, lambda draw, n: {**padded(draw, n), "labels": draw.ids(2, n)}),
]  # fmt: skip


# --- encoder-decoder --------------------------------------------------------------------------------------------------

T5 = {
    "vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
    "relative_attention_num_buckets": 6, "relative_attention_max_distance": 8, "pad_token_id": 1,
    "decoder_start_token_id": 1,
}  # fmt: skip
BART = {
    "vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 16,
    "pad_token_id": 1, "decoder_start_token_id": 2,
}  # fmt: skip

SEQUENCE_TO_SEQUENCE = [
    model_case("t5 tied", pretrained("T5ForConditionalGeneration", "T5Config", **T5), token_loss, translated),
    model_case("t5 gated, untied", pretrained(
        "T5ForConditionalGeneration", "T5Config", **T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False
    ), token_loss, translated),
    model_case("bart tied", pretrained("BartForConditionalGeneration", "BartConfig", **BART), token_loss, translated),
    model_case("bart eager attention", pretrained(
        "BartForConditionalGeneration", "BartConfig", **BART, attn_implementation="eager", scale_embedding=True
    ), token_loss, translated),
]  # fmt: skip


# --- vision and audio -------------------------------------------------------------------------------------------------

TEXT_TOWER = {**SMALL, "eos_token_id": 2, "bos_token_id": 3}
SWIN = {"patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": 4, "num_labels": 2}
CLIP = {"text_config": TEXT_TOWER, "vision_config": VISION, "projection_dim": 8}
WHISPER = {
    **BART, "num_mel_bins": 4, "max_source_positions": 4, "max_target_positions": 8, "bos_token_id": 3,
    "eos_token_id": 2, "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 2], "num_labels": 2}


def llava(*, frozen: bool) -> Callable[[], nn.Module]:
    """A CLIP tower, two linear maps and Llama; the tower is frozen."""

    def build() -> nn.Module:
        tower = {**VISION, "projection_dim": 8, "model_type": "clip_vision_model"}
        language = {**SMALL, "num_key_value_heads": 1, "use_cache": False, "model_type": "llama"}
        options: dict[str, Any] = {"image_token_id": 0, "image_token_index": 0, "vision_feature_layer": -1}
        config = transformers.LlavaConfig(vision_config=tower, text_config=language, **options)
        module = transformers.LlavaForConditionalGeneration(config)
        if frozen:
            module.model.vision_tower.requires_grad_(False)
        return module

    return build


def language_loss(output: Any, batch: Batch) -> Tensor:
    """Next-token loss over each sample's own text, without the image's tokens."""
    labels = batch["input_ids"].masked_fill((batch["attention_mask"] == 0) | (batch["input_ids"] == 0), -100)
    return gf.causal_lm_loss(output, {"labels": labels})


VISION_AND_AUDIO = [
    model_case("vit", pretrained("ViTForImageClassification", "ViTConfig", **VISION), gf.classification_loss, pictures),
    model_case("swin", pretrained("SwinForImageClassification", "SwinConfig", image_size=16, **SWIN),
               gf.classification_loss, lambda draw, n: pictures(draw, n, 16)),
    model_case("swin padded windows", pretrained(
        "SwinForImageClassification", "SwinConfig", image_size=20, use_absolute_embeddings=True, **SWIN
    ), gf.classification_loss, lambda draw, n: pictures(draw, n, 20)),
    model_case("convnext", pretrained(
        "ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=[8, 12], depths=[1, 2], num_stages=2,
        patch_size=2, num_labels=2,
    ), gf.classification_loss, pictures),
    model_case("resnet", pretrained("ResNetForImageClassification", "ResNetConfig", layer_type="basic", **RESNET),
               tempered_loss, lambda draw, n: pictures(draw, n, 16)),
    model_case("resnet bottleneck", pretrained(
        "ResNetForImageClassification", "ResNetConfig", layer_type="bottleneck", **RESNET
    ), tempered_loss, lambda draw, n: pictures(draw, n, 16)),
    model_case("clip own pair", pretrained("CLIPModel", "CLIPConfig", **CLIP), pair_loss, captioned, _with_scale),
    model_case("whisper", pretrained("WhisperForConditionalGeneration", "WhisperConfig", **WHISPER), token_loss,
               spoken),
    model_case("llava, vision tower frozen", llava(frozen=True), language_loss, conversation),
    model_case("llava", llava(frozen=False), language_loss, conversation, zero=(*KEYS, "post_layernorm")),
]  # fmt: skip


# --- LoRA -------------------------------------------------------------------------------------------------------------

LLAMA = {**SMALL, "num_key_value_heads": 1, "use_cache": False}
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "use_cache": False,
    "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip


def adapted(kind: str, config: str, options: dict[str, Any], **lora: Any) -> Any:
    """A transformers model with peft's LoRA adapters, whose B are not zero."""

    def build() -> nn.Module:
        peft = pytest.importorskip("peft")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft asks transformers for an attribute that is deprecated
            return peft.get_peft_model(
                pretrained(kind, config, **options)(), peft.LoraConfig(r=2, lora_alpha=3, **lora)
            )

    return build


LORA = [
    model_case("lora llama", adapted("LlamaForCausalLM", "LlamaConfig", LLAMA, target_modules=["q_proj", "v_proj"]),
               gf.causal_lm_loss, padded),
    model_case("lora gpt2 conv1d, embedding and head", adapted(
        "GPT2LMHeadModel", "GPT2Config", {**GPT2, "tie_word_embeddings": False},
        target_modules=["c_attn", "c_proj", "wte", "lm_head"], fan_in_fan_out=True,
    ), gf.causal_lm_loss, padded),
    model_case("lora with trained norms, biases and head", adapted(
        "BertForSequenceClassification", "BertConfig", SMALL, target_modules=["query", "value"], bias="all",
        modules_to_save=["classifier"],
    ), gf.classification_loss, classified),
    model_case("rank-stabilised lora of every layer", adapted(
        "LlamaForCausalLM", "LlamaConfig", LLAMA, target_modules="all-linear", use_rslora=True
    ), gf.causal_lm_loss, padded),
    model_case("dora", adapted(
        "LlamaForCausalLM", "LlamaConfig", LLAMA, target_modules=["q_proj", "down_proj"], use_dora=True
    ), gf.causal_lm_loss, padded),
    model_case("lora of convolutions", adapted(
        "ResNetForImageClassification", "ResNetConfig", {"layer_type": "basic", **RESNET},
        target_modules=["convolution"],
    ), tempered_loss, lambda draw, n: pictures(draw, n, 16)),
]  # fmt: skip

MODELS = [*ENCODERS, *SEQUENCE_TO_SEQUENCE, *VISION_AND_AUDIO, *LORA]
OTHERS = [*MODULES, *MODELS]


# --- samples that interact --------------------------------------------------------------------------------------------


class Refused(NamedTuple):
    """A case that has no per-sample gradients, the error that says so, and words that the error's text has.

    Attributes:
        case: the case.
        error: the exception's type.
        words: regular expressions, each found in the text.
    """

    case: ZooCase
    error: type[Exception]
    words: tuple[str, ...]


def interacting(name: str, build: Callable[[], nn.Module], *words: str, shape: tuple[int, ...] = (5, 4)) -> Refused:
    """A module in training mode whose samples interact."""
    return Refused(module_case(name, build, *shape, train=True), gf.InteractingSamples, ("sample", *words))


def interacting_loss(name: str, loss: Any, *words: str, error: type[Exception] = gf.InteractingSamples) -> Refused:
    """BERT's masked language modelling with a loss in which samples interact, or which is one number."""
    build = pretrained("BertForMaskedLM", "BertConfig", **SMALL)
    return Refused(model_case(name, build, loss, masked), error, words)


def _counted_together(output: Any, batch: Batch) -> Tensor:
    """Each sample's sum over the number of labels in the whole batch, as HF's `num_items_in_batch` has it."""
    labels = batch["labels"]
    losses = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    return losses.sum(1) / (labels != -100).sum()


class Sequential(nn.Module):
    """A module that reads `[T, B, d]`, called with `[B, T, d]`: the samples take the place of the positions."""

    def __init__(self, module: nn.Module, *, pair: bool = False) -> None:
        super().__init__()
        self.module, self.copies = module, 3 if pair else 1

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, d]` to `[B, T, d']`."""
        return self.module(*[x] * self.copies)[0]


class OverTheBatch(nn.Module):
    """A softmax over the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, 4]` to `[B, T, 3]`."""
        return self.linear(x).softmax(0)


class Resized(nn.Module):
    """Samples that are normalised together, in one group."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, 4]` to `[B, T, 4]`."""
        return F.group_norm(self.norm(x).view(1, 1, -1), 1).view(x.shape)


REFUSED = [
    interacting("batch norm 1d in training", lambda: nn.BatchNorm1d(5), "batch_norm", "eval"),
    interacting("batch norm 2d in training", lambda: nn.BatchNorm2d(4), "batch_norm", "eval", shape=(4, 3, 3)),
    interacting("batch norm 3d in training", lambda: nn.BatchNorm3d(2), "batch_norm", "eval", shape=(2, 2, 3, 2)),
    interacting("softmax over the samples", OverTheBatch, "softmax"),
    interacting("normalised together", Resized, "group_norm|samples meet"),
    interacting("lstm over the samples", lambda: Sequential(nn.LSTM(4, 3))),
    interacting("gru over the samples", lambda: Sequential(nn.GRU(4, 3))),
    interacting("rnn over the samples", lambda: Sequential(nn.RNN(4, 3))),
    interacting("attention over the samples", lambda: Sequential(nn.MultiheadAttention(4, 2), pair=True)),
    Refused(
        module_case("batch norm without statistics", lambda: nn.BatchNorm1d(5, track_running_stats=False), 5, 4),
        gf.InteractingSamples, ("batch_norm", "eval"),
    ),
    Refused(
        model_case("resnet in training", pretrained("ResNetForImageClassification", "ResNetConfig", **RESNET),
                   tempered_loss, lambda draw, n: pictures(draw, n, 16), train=True),
        gf.InteractingSamples, ("batch_norm", "eval"),
    ),
    Refused(
        model_case("clip with negatives", pretrained("CLIPModel", "CLIPConfig", **CLIP), contrastive_loss, captioned,
                   _with_scale),
        gf.InteractingSamples, ("sample", "in-batch"),
    ),
    interacting_loss("labels counted together", _counted_together, "`sum`", "samples meet"),
    interacting_loss("a mean over the batch", lambda output, batch: token_loss(output, batch).mean().expand(
        len(batch["labels"])), "`mean`", "samples meet", "reduction='none'"),
    interacting_loss("a loss less its mean", lambda output, batch: token_loss(output, batch) - token_loss(
        output, batch).mean(), "`mean`", "samples meet"),
    interacting_loss("a scalar", lambda output, batch: token_loss(output, batch).mean(), "scalar", r"shape \[\d\]",
                     "reduction='none'", error=ValueError),
]  # fmt: skip
