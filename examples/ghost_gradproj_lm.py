"""Projections of a language model's gradients, one row for each passage, and which passages are alike by them.

    python examples/ghost_gradproj_lm.py --proj_layers "attn.c_attn,mlp.c_fc"
    torchrun --nproc_per_node 2 examples/ghost_gradproj_lm.py      # the same rows, each process a share of the batches

The passages come with Python: pages of its manual, its source code, documentation of mathematics, and lists of
characters. Their rows are stored, read back, and compared. Where `--model_name` cannot be had (gpt2 needs the hub, or
its cache), that is said, and the model that `make demo` trained is taken; without that one a fresh one.
"""

import argparse
import fnmatch
import hashlib
import inspect
import math
import shlex
import statistics
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import ghostfunc as gf
from ghostfunc.index import Model, Store, load_model
from ghostfunc.text import PACKAGED_TOKENIZER, load_tokenizer
from shared.distributed import Launch, launched
from shared.model_setup import GPT2_VOCABULARY, build_model, model_config, quiet_transformers

CHECKOUT = Path(__file__).resolve().parents[1]
PROJ_DIR = CHECKOUT / "results" / "ghost_gradproj_lm"
DEMO = CHECKOUT / "demo"
FRESH = "GPT2-Nano"
TOKENS = 64  # of a passage; longer ones are cut
TIMEOUT = 600  # seconds that a process waits for another
SHOWN = 34  # characters of a passage in the table
NAMES_IN_A_LIST = 6


class Passage(NamedTuple):
    """A piece of text and its domain."""

    domain: str
    text: str


# --- texts ------------------------------------------------------------------------------------------------------------


def passages() -> Iterator[Passage]:
    """Passages of four domains in turn, until one of them has no more."""
    alphabets = ([chr(first + k) for k in range(NAMES_IN_A_LIST)] for first in range(0x391, 0x2800, 0x40))
    lists = ("\n".join(unicodedata.name(letter, "unassigned") for letter in letters) for letters in alphabets)
    code = [f for module in (textwrap, fnmatch, shlex, inspect) for f in _functions(module) if inspect.isfunction(f)]
    of_domain = {
        "manual": (topics[name] for name in sorted(topics)),
        "code": map(inspect.getsource, code),
        "mathematics": (inspect.getdoc(f) or "" for module in (statistics, math) for f in _functions(module)),
        "characters": lists,
    }
    for texts in zip(*of_domain.values(), strict=False):
        for domain, text in zip(of_domain, texts, strict=True):
            yield Passage(domain, text.strip())


def _functions(module: ModuleType) -> list[Callable]:
    found = [value for name, value in sorted(vars(module).items()) if not name.startswith("_")]
    return [f for f in found if inspect.isroutine(f) and f.__module__ == module.__name__]


def chosen_passages(args: argparse.Namespace) -> list[Passage]:
    """As many passages as the batches need.

    Raises:
        SystemExit: if there are not so many.
    """
    wanted = args.num_batches * args.batch_size
    found = list(islice(passages(), wanted))
    if len(found) < wanted:
        sys.exit(f"{args.num_batches} batches of {args.batch_size} need {wanted} passages; there are {len(found)}.")
    return found


def padded(model: Model, texts: list[str]) -> dict[str, Tensor]:
    """A batch `[B, T]` of texts, cut to `TOKENS` and padded to the longest, with labels of -100 at the padding."""
    positions = min(TOKENS, getattr(model.module.config, "max_position_embeddings", TOKENS))
    ids = [torch.tensor(model.tokenizer(text)["input_ids"][:positions]) for text in texts]
    length = max(map(len, ids))
    mask = torch.stack([(torch.arange(length) < len(row)).long() for row in ids])
    tokens = torch.stack([torch.nn.functional.pad(row, (0, length - len(row))) for row in ids])
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


# --- the model --------------------------------------------------------------------------------------------------------


def find_model(name: str) -> Model:
    """The model of that name, or what there is in its place; says which.

    Raises:
        SystemExit: if the name is a folder's, and no model is in it.
    """
    try:
        return load_model(name)
    except (OSError, ValueError) as error:
        if Path(name).exists() or name.startswith((".", "/", "~")):
            sys.exit(f"--model_name {name}: {error}")
        print(f"{name} cannot be had: {error}")
    checkpoints = sorted((DEMO / "results").glob("*/checkpoint/step-*"), key=lambda folder: folder.stat().st_mtime)
    if checkpoints:
        print(f"Taken in its place: the model that `make demo` trained ({checkpoints[-1].name}).")
        return load_model(checkpoints[-1])
    print(f"Taken in its place: a fresh {FRESH}.")
    return fresh_model()


def fresh_model() -> Model:
    """A small GPT-2 that has learnt nothing, with GPT-2's tokens."""
    torch.manual_seed(0)
    module = build_model(model_config(FRESH, None, GPT2_VOCABULARY, TOKENS), None, torch.float32)
    return Model(module.eval(), load_tokenizer(PACKAGED_TOKENIZER), f"fresh {FRESH}", trained=False)


def require_tokens(model: Model) -> None:
    """Refuse a model that cannot be given passages.

    Raises:
        SystemExit: if it has no tokenizer, or one with more tokens than it has embeddings.
    """
    if model.tokenizer is None:
        sys.exit(f"{model.name} has no tokenizer beside its weights: put its tokenizer.json there.")
    if len(model.tokenizer) > model.vocab_size:
        sys.exit(
            f"The tokenizer of {model.name} has {len(model.tokenizer)} tokens, and the model embeddings of "
            f"{model.vocab_size}: they do not belong together."
        )


# --- projections ------------------------------------------------------------------------------------------------------


def collect(model: Model, texts: list[Passage], args: argparse.Namespace, launch: Launch) -> None:
    """Project the batches that the store lacks: of several processes each its share."""
    engine = gf.GradProjEngine(
        model.module,
        proj_layers=args.proj_layers,
        proj_rank_total=args.proj_rank_total,
        proj_rank_min=args.proj_rank_min,
        proj_seed=args.proj_seed,
        proj_dtype=args.proj_dtype,
        include_embeddings=args.include_embeddings,
        proj_dir=args.proj_dir,
        proj_save_interval=args.proj_save_interval,
        config={
            "model": {"name": model.name, "fingerprint": model.fingerprint},
            "data": {"fingerprint": hashlib.sha256("\0".join(p.text for p in texts).encode()).hexdigest()},
            "tokens": TOKENS,
        },
        group=dist.group.WORLD if launch.size > 1 else None,
    )
    first = padded(model, [passage.text for passage in texts[: args.batch_size]])
    engine.attach(first, samples=len(texts), batch_size=args.batch_size)
    assert engine.projection is not None
    print(f"{len(engine.projection.slices)} parameters to {engine.projection.dim} numbers")
    if engine.rows_written:
        print(f"{engine.rows_written} rows are in {args.proj_dir} already")
    with engine.batches() as batches:
        for rows in batches:
            batch = texts[rows.start : rows.stop]
            domains = [passage.domain for passage in batch]
            engine.collect_batch(padded(model, [passage.text for passage in batch]), rows, domains=domains)
            assert engine.losses is not None
            print(f"batch {rows.start // args.batch_size}: {engine.losses.mean():.2f} nats per token")


def similarities(proj_dir: Path, count: int) -> Tensor:
    """Cosines of the first rows of a store with each other, `[count, count]`."""
    rows = torch.nn.functional.normalize(Store(proj_dir).read(0, count))
    return rows @ rows.T


def table(texts: list[Passage], cosines: Tensor) -> str:
    """The similarity matrix in hundredths, with the passages at its rows.

    Args:
        texts: the n passages.
        cosines: `[n, n]`.
    """
    numbers = "".join(f"{number:4d}" for number in range(len(texts)))
    lines = [f"{'cosine x 100':<{SHOWN + 16}}{numbers}"]
    for number, (passage, row) in enumerate(zip(texts, cosines.tolist(), strict=True)):
        text = " ".join(passage.text.split())
        shown = text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
        values = "".join(f"{round(100 * value):4d}" for value in row)
        lines.append(f"{number:3d} {passage.domain:<11} {shown:<{SHOWN}}{values}")
    return "\n".join(lines)


def within_and_across(texts: list[Passage], cosines: Tensor) -> tuple[float, float]:
    """Mean cosine of two passages of one domain, and of two domains; NaN where there are no such two."""
    domains = [passage.domain for passage in texts]
    same = torch.tensor([[one == other for other in domains] for one in domains])
    others = ~torch.eye(len(texts), dtype=torch.bool)
    return cosines[same & others].mean().item(), cosines[~same].mean().item()


# --- command line -----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model_name", default="gpt2", help="a name on the hub, or a folder")
    options.add_argument("--proj_layers", default="attn.c_attn,mlp.c_fc", help="parts of names, matched at dots")
    options.add_argument("--proj_rank_total", type=int, default=256, help="about how many numbers a layer becomes")
    options.add_argument("--proj_rank_min", type=int, default=8, help="the least rank of either side")
    options.add_argument("--proj_seed", type=int, default=42, help="of the projection's matrices")
    options.add_argument("--proj_dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    options.add_argument("--proj_dir", type=Path, default=PROJ_DIR, help="the store")
    options.add_argument("--proj_save_interval", type=int, default=1, help="write after so many batches")
    options.add_argument("--include_embeddings", action="store_true", help="project embeddings too")
    options.add_argument("--num_batches", type=int, default=5)
    options.add_argument("--batch_size", type=int, default=4)
    return options


def main() -> None:
    """Project passages, read the rows back, and print which passages are alike."""
    args = parser().parse_args()
    for name in ("num_batches", "batch_size"):
        if getattr(args, name) < 1:
            sys.exit(f"--{name} {getattr(args, name)}: expected 1 or more.")
    quiet_transformers()
    texts = chosen_passages(args)
    try:
        with launched("cpu", TIMEOUT) as launch:
            with launch.together():
                model = find_model(args.model_name)
                require_tokens(model)
            if not model.trained:
                print(f"{model.name} is untrained: its gradients say little about texts.")
            collect(model, texts, args, launch)
            show(texts, similarities(args.proj_dir, len(texts)), args.proj_dir)
    except (ValueError, gf.RankFailed) as error:
        sys.exit(str(error))


def show(texts: list[Passage], cosines: Tensor, proj_dir: Path) -> None:
    """Print which passages are alike."""
    print(f"\nRead back from {proj_dir}:\n{table(texts, cosines)}")
    within, across = within_and_across(texts, cosines)
    if not math.isnan(within + across):
        print(f"\nMean cosine of two passages of one domain {within:.2f}, of two domains {across:.2f}")


if __name__ == "__main__":
    main()
