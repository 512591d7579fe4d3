"""Project the gradient of every sample of a corpus, and store the projections: a few hundred numbers for each layer.

    python main.py --checkpoint RUN_OF_GRADDOTPROD_LM --batch_size 2 --max_samples 1000
    torchrun --nproc_per_node 2 main.py --checkpoint RUN_OF_GRADDOTPROD_LM --batch_size 2 --max_samples 1000

Run again with the same options, by any number of processes, it continues where it stopped.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/, for `shared` and this package

from ghostfunc import RankFailed
from ghostfunc.failures import fail_together
from ghostfunc.index import load_model, model_fingerprint
from GradProj_LM import config_file
from GradProj_LM.gradproj_loop import Projector, Run
from shared.dataloader import load_corpus
from shared.distributed import Launch, launched
from shared.model_setup import (
    ARCHITECTURES,
    DataVocabulary,
    build_model,
    data_vocabulary,
    model_config,
    quiet_transformers,
    require_fit,
)
from shared.options import natural, positive
from shared.utils import DTYPES, run_name, seed_everything

# What decides the numbers of a run, beside the fingerprints of its weights and of its data.
DECISIVE = (
    "proj_layers",
    "proj_rank_total",
    "proj_rank_min",
    "proj_seed",
    "proj_dtype",
    "proj_row_orthonormal",
    "include_embeddings",
    "proj_save_interval",
    "batch_size",
    "model_dtype",
    "train_dtype",
)


def main(argv: Sequence[str] | None = None) -> Path:
    """Project the samples of one configuration.

    Args:
        argv: the options; None takes those of the command line.

    Returns:
        The run's folder, which is a store.

    Raises:
        SystemExit: with the reason on stderr, if an option is wrong, data or model cannot be read, or the folder holds
            another run or is damaged, here or in another process; after SIGTERM or Ctrl-C, when the batch in hand is
            done.
    """
    parser = build_parser()
    options = parse(parser, argv)
    status = 2
    try:
        with launched(options.device, options.timeout) as launch, fail_together():
            projector = prepare(options, launch)
            status = 1
            projector.project()
            return projector.run.folder
    except (ImportError, OSError, ValueError, FloatingPointError, RankFailed) as error:
        parser.exit(status, f"{parser.prog}: error: {error}\n")


def build_parser() -> argparse.ArgumentParser:
    """All options and their defaults."""
    parser = argparse.ArgumentParser(
        description="Project the gradient of every sample of a corpus, and store the projections. The same options "
        "again continue an interrupted run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", help="the model: a run of GradDotProd_LM, a model folder, or a hub name")
    add("--architecture", choices=list(ARCHITECTURES), default="GPT2-Small", help="without --checkpoint: untrained")
    add("--seed", type=natural, default=42, help="of untrained weights")
    add(
        "--proj_layers",
        default="mlp,attn",
        help="comma-separated parts of names; '' takes all linear maps but the head",
    )
    add("--proj_rank_total", type=positive, default=256, help="about how many numbers a layer becomes")
    add("--proj_rank_min", type=positive, default=4, help="the least of a layer's two ranks")
    add("--proj_seed", type=natural, default=42, help="of the projection's matrices")
    add("--proj_dtype", choices=list(DTYPES), default="bfloat16", help="of the stored rows")
    add("--proj_row_orthonormal", action="store_true", help="orthogonal directions instead of Gaussian ones")
    add("--include_embeddings", action="store_true", help="project embeddings, too")
    add("--proj_save_interval", type=positive, default=10, help="batches of a shard: what a kill may cost")
    add("--batch_size", type=positive, default=2, help="of a process")
    add("--max_samples", type=_count_or_all, default=1000, help="the first so many of the corpus, or all")
    add("--block_size", type=positive, default=1024, help="tokens of a sample")
    add("--train_set", default="pile", help="pile, comma-separated domain names, or a folder of .bin files")
    add("--data_dir", help="tokenized data; over PILE_DATA_DIR, over config_file.py")
    add("--output_dir", help="the run's folder; without it one of its own in RESULTS_DIR")
    add("--model_dtype", choices=list(DTYPES), default="float32", help="of the weights")
    add(
        "--train_dtype",
        choices=list(DTYPES),
        default=argparse.SUPPRESS,
        help="of the arithmetic; other than --model_dtype means autocast (default: that of --model_dtype)",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--timeout", type=positive, default=1800, help="seconds that a process waits for another before it gives up")
    add("--verbose", action="store_true", help="print each layer's ranks")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options and refuse combinations that have no meaning."""
    options = parser.parse_args(argv)
    options.train_dtype = getattr(options, "train_dtype", options.model_dtype)
    options.data_dir = str(config_file.data_dir(options.data_dir))
    if options.checkpoint and Path(options.checkpoint).exists():
        options.checkpoint = str(Path(options.checkpoint).resolve())
    if options.train_set != "pile" and Path(options.train_set).is_dir():
        options.train_set = str(Path(options.train_set).resolve())
    if options.train_dtype != options.model_dtype != "float32":
        parser.error(
            f"--train_dtype {options.train_dtype} with --model_dtype {options.model_dtype}: autocast starts from "
            "float32 weights. Use --model_dtype float32, or leave out --train_dtype."
        )
    return options


def prepare(options: argparse.Namespace, launch: Launch) -> Projector:
    """A run with its model and its data, and its folder opened; in all processes of the launch at once.

    Raises:
        OSError: as `set_up`; a ValueError where another process raised one.
        ValueError: as `set_up` and `Projector`.
        RankFailed: as `Projector`.
    """
    with launch.together():
        run = set_up(options, launch)
    return Projector(run)


def set_up(options: argparse.Namespace, launch: Launch) -> Run:
    """Read the data and the model, and find the run's folder.

    Raises:
        OSError: if there is no data or no checkpoint, or a folder cannot be read.
        ValueError: if data, model and options do not fit each other.
    """
    quiet_transformers()
    seed_everything(options.seed, launch.device)
    vocabulary = data_vocabulary(options.data_dir)
    model, trained = _load(options, vocabulary)
    corpus = load_corpus(
        options.data_dir,
        "train",
        options.train_set,
        block_size=options.block_size,
        vocab_size=model.config.vocab_size,
    )
    samples = corpus.blocks if options.max_samples is None else min(options.max_samples, corpus.blocks)
    name = options.checkpoint or options.architecture
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    configuration = {
        "model": {"name": name, "trained": trained, "fingerprint": model_fingerprint(params)},
        "data": {"name": Path(options.train_set).name, "fingerprint": corpus.fingerprint(samples)},
        **{option: getattr(options, option) for option in DECISIVE},
    }
    folder = config_file.output_dir(options.output_dir, _name_of(options, configuration))
    size = sum(p.numel() for p in params.values())
    print(f"{Path(name).name}: {size:,} parameters, {options.model_dtype}, on {_place(launch)}")
    if not trained:
        print("The weights are untrained: these gradients say nothing of a trained model. Name one with --checkpoint.")
    model.to(launch.device)  # type: ignore[arg-type] # transformers' decorator hides the signature
    return Run(options, configuration, folder, launch, corpus, samples, model)


def recorded(folder: Path) -> argparse.Namespace:
    """The options of a run that `main` made, for `prepare`.

    Raises:
        OSError: if the folder is none.
        ValueError: if its record is damaged.
    """
    options = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return argparse.Namespace(**{**options, "output_dir": str(folder)})


def _place(launch: Launch) -> str:
    return f"{launch.device}, {launch.size} processes" if launch.size > 1 else str(launch.device)


def _load(options: argparse.Namespace, vocabulary: DataVocabulary | None) -> tuple[PreTrainedModel, bool]:
    """The model, and whether it is trained."""
    dtype = DTYPES[options.model_dtype]
    if not options.checkpoint:
        config = model_config(options.architecture, None, vocabulary, options.block_size)
        return build_model(config, None, dtype), False
    loaded = load_model(options.checkpoint, dtype=dtype)
    model: Any = loaded.module
    require_fit(model.config, options.checkpoint, vocabulary, options.block_size)
    return model, loaded.trained


def _name_of(options: argparse.Namespace, configuration: dict[str, Any]) -> str:
    readable = [
        "GradProj",
        Path(options.checkpoint or options.architecture).name,
        f"rank{options.proj_rank_total}",
        options.proj_dtype,
        f"seed{options.proj_seed}",
        Path(options.train_set).name,
    ]
    return run_name(readable, {**configuration, "model": configuration["model"]["fingerprint"]})


def _count_or_all(text: str) -> int | None:
    return None if text == "all" else positive(text)


if __name__ == "__main__":
    main()
