"""Train a causal language model, and log the gradient dot product of every training sample with a validation batch.

    python main.py --architecture GPT2-Nano --block_size 128 --max_steps 100

    torchrun --nproc_per_node 2 main.py --batch_size 8

Run again with the same options, it continues where it stopped.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/, for `shared` and this package

from ghostfunc.failures import fail_together
from GradDotProd_LM import config_file
from GradDotProd_LM.training_loop import Run, Trainer, as_text
from shared.dataloader import Corpora, load_corpora
from shared.distributed import Launch, launched
from shared.model_setup import ARCHITECTURES, build_model, data_vocabulary, model_config, quiet_transformers
from shared.options import natural, positive, positive_float
from shared.training_utils import OPTIMIZERS
from shared.utils import DTYPES, run_name, seed_everything, write_whole

# What may change between two starts of one run: where it runs and how often it saves, not what it computes.
NOT_IN_THE_NUMBERS = (
    "results_dir",
    "device",
    "timeout",
    "dot_prod_save_interval",
    "checkpoint_interval",
    "interleave_plain",
    "eval_only",
    "fresh",
)


def main(argv: Sequence[str] | None = None) -> Path:
    """Train (or, with `--eval_only`, evaluate) one configuration.

    Args:
        argv: the options; None takes those of the command line.

    Returns:
        The run's folder.

    Raises:
        SystemExit: with the reason on stderr, if an option is wrong or data or model cannot be read; after SIGTERM or
            Ctrl-C, when everything is saved.
    """
    parser = build_parser()
    options = parse(parser, argv)
    with ExitStack() as stack:
        is_first = True
        try:
            launch = stack.enter_context(launched(options.device, options.timeout))
            stack.enter_context(fail_together())
            is_first = launch.is_first
            run = set_up(options, launch)
        except (OSError, ValueError) as error:
            parser.exit(2, f"{parser.prog}: error: {error}\n" if is_first else None)
        trainer = Trainer(run)
        if options.eval_only:
            print(f"after {trainer.done} steps: {as_text(trainer.evaluate())}")
        elif trainer.is_complete:
            print(f"complete: {run.folder} (--fresh trains it again)")
        else:
            trainer.train()
            print(f"results: {run.folder}")
        return run.folder


def build_parser() -> argparse.ArgumentParser:
    """All options and their defaults."""
    parser = argparse.ArgumentParser(
        description="Train a causal language model and log the gradient dot product of every training sample with a "
        "validation batch. The same options again continue an interrupted run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--method", choices=["GradDotProd", "Regular"], default="GradDotProd", help="Regular: plain training")
    add("--architecture", choices=list(ARCHITECTURES), default="GPT2-Small", help="trained from scratch")
    add("--model", help="instead: any causal LM, a folder or a hub name")
    add("--model_init", choices=["pretrained", "fresh"], default="pretrained", help="weights of --model")
    add("--batch_size", type=positive, default=16, help="training samples of a micro-batch, in each process")
    add("--gradient_accumulation_steps", type=positive, default=1, help="micro-batches of a step")
    add("--val_batch_size", type=positive, default=1, help="validation samples that the dots refer to, in all")
    add("--block_size", type=positive, default=1024, help="tokens of a sample")
    add("--max_steps", type=positive, default=50000)
    add("--learning_rate", type=positive_float, default=3e-4, help="the peak; a tenth of it at the end")
    add("--warmup_step", type=natural, default=2000, help="steps of linear warm-up")
    add("--optimizer", choices=list(OPTIMIZERS), default="adamw")
    add("--order", type=int, choices=[1, 2], default=1, help="2: values with the validation loss's curvature")
    add("--metric", choices=["sgd", "adam"], default="sgd", help="whose step dots and values speak of")
    add("--on_nonfinite", choices=["raise", "skip"], default="raise", help="samples with nan or infinity")
    add("--seed", type=natural, default=42)
    add("--train_set", default="pile", help="pile, comma-separated domain names, or a folder of .bin files")
    add("--val_set", default="pile", help="likewise")
    add("--eval_only", action="store_true", help="evaluate the newest checkpoint, or the model at its start")
    add("--eval_interval", type=positive, default=200, help="steps between evaluations")
    add("--eval_iter", type=positive, default=20, help="batches of an evaluation, of each split")
    add("--eval_bs", type=positive, default=16, help="samples of an evaluation batch")
    add("--dot_prod_save_interval", type=positive, default=10, help="steps between saves of the log")
    add("--checkpoint_interval", type=positive, default=1000, help="steps between checkpoints")
    add("--fresh", action="store_true", help="discard this configuration's earlier results and start over")
    add("--model_dtype", choices=list(DTYPES), default="float32", help="of the weights; float16 for --eval_only")
    add(
        "--train_dtype",
        choices=list(DTYPES),
        default=argparse.SUPPRESS,
        help="of the arithmetic; other than --model_dtype means autocast, float16 a loss scaler "
        "(default: that of --model_dtype)",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--timeout", type=positive_float, default=600, help="seconds that a process waits for the others")
    add("--data_dir", help="tokenized data; over PILE_DATA_DIR, over config_file.py")
    add("--results_dir", help="holds the run folders; over RESULTS_DIR, over config_file.py")
    add(
        "--interleave_plain",
        type=positive,
        metavar="N",
        help="at every N-th step also time a plain training step on the same batch",
    )
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options and refuse combinations that have no meaning."""
    options = parser.parse_args(argv)
    options.train_dtype = getattr(options, "train_dtype", options.model_dtype)
    if options.model_dtype == "float16" and not options.eval_only:
        parser.error(
            "--model_dtype float16 cannot train: updates below float16's resolution are lost, and losses cannot be "
            "scaled. Use --model_dtype float32 --train_dtype float16."
        )
    if options.train_dtype != options.model_dtype != "float32":
        parser.error(
            f"--train_dtype {options.train_dtype} with --model_dtype {options.model_dtype}: autocast starts from "
            f"float32 weights. Use --model_dtype float32, or leave out --train_dtype."
        )
    if options.interleave_plain and options.method == "Regular":
        parser.error("--interleave_plain compares with --method GradDotProd; with Regular every step is plain")
    if options.method == "Regular" and options.on_nonfinite == "skip":
        parser.error("--on_nonfinite skip is about --method GradDotProd: with Regular no gradient is of one sample")
    if options.method == "Regular" and (options.order, options.metric) != (1, "sgd"):
        parser.error("--order and --metric are about --method GradDotProd; Regular computes no values")
    if options.metric == "adam" and options.optimizer == "sgd":
        parser.error("--metric adam reads Adam's state: use it with --optimizer adamw or adam")
    if options.order == 2 and options.gradient_accumulation_steps > 1:
        parser.error(
            "--order 2 with --gradient_accumulation_steps: the samples of a step interact, and each micro-batch knows "
            "only its own. Use a larger --batch_size, or --order 1."
        )
    if options.order == 2 and options.train_dtype == "float16":
        parser.error("--order 2 with float16: scaled losses have a curvature that it cannot hold. Use bfloat16.")
    return options


def set_up(options: argparse.Namespace, launch: Launch) -> Run:
    """Read the data, build the model, and find the run's folder; in all processes of the launch at once.

    Raises:
        OSError: if there is no data (FileNotFoundError), or a folder cannot be read or written.
        ValueError: if data, model and options do not fit each other, or processes have different ones.
    """
    quiet_transformers()
    with launch.together():
        data_dir = config_file.data_dir(options.data_dir)
        config = model_config(options.architecture, options.model, data_vocabulary(data_dir), options.block_size)
        corpora = load_corpora(
            data_dir, options.train_set, options.val_set, block_size=options.block_size, vocab_size=config.vocab_size
        )
        # Both raise where there is too little data.
        corpora.train.sample(options.batch_size, seed=options.seed, step=0, rank=launch.rank, ranks=launch.size)
        corpora.val.sample(options.val_batch_size, seed=options.seed, step=0)
        configuration = _configuration(options, data_dir, corpora, launch.size)
    launch.require_same("options or data", configuration)

    results = config_file.results_dir(options.results_dir)
    folder = results / _name_of(configuration)
    launch.require_shared(results)
    with launch.together():
        if launch.is_first:
            if options.fresh:
                shutil.rmtree(folder, ignore_errors=True)
            write_whole(folder / "config.json", json.dumps(configuration, indent=2) + "\n")

    with launch.together():
        seed_everything(options.seed, launch.device)
        pretrained = options.model if options.model_init == "pretrained" else None
        model = build_model(config, pretrained, DTYPES[options.model_dtype])
        model.to(launch.device)  # type: ignore[arg-type] # transformers' decorator hides the signature
    launch.copy_first(model)
    if not launch.is_first:  # dropout: each process draws its own
        torch.manual_seed(int(np.random.default_rng([options.seed, launch.rank]).integers(2**63)))
    size = sum(p.numel() for p in model.parameters())
    where = str(launch.device) if launch.size == 1 else f"{launch.device.type} in {launch.size} processes"
    print(f"{options.model or options.architecture}: {size:,} parameters, {options.model_dtype}, on {where}")
    return Run(options, configuration, folder, launch, corpora, model)


def _configuration(options: argparse.Namespace, data_dir: Path, corpora: Corpora, processes: int) -> dict[str, Any]:
    """What decides the numbers of a run: the options, and the data they led to. Its batch is that of all processes."""
    decisive = {name: value for name, value in vars(options).items() if name not in NOT_IN_THE_NUMBERS}
    decisive["batch_size"] *= processes
    for name in ("model", "train_set", "val_set"):
        if decisive[name] and Path(decisive[name]).is_dir():
            decisive[name] = str(Path(decisive[name]).resolve())
    data = {split: {"domains": corpus.domains, "tokens": corpus.tokens} for split, corpus in corpora._asdict().items()}
    return decisive | {"data_dir": str(data_dir), "data": data}


def _name_of(configuration: dict[str, Any]) -> str:
    readable = [
        configuration["method"],
        Path(configuration["model"] or configuration["architecture"]).name,
        f"bs{configuration['batch_size']}",
        f"vbs{configuration['val_batch_size']}",
        f"lr{configuration['learning_rate']:g}",
        f"seed{configuration['seed']}",
        Path(configuration["train_set"]).name,
        Path(configuration["val_set"]).name,
    ]
    return run_name(readable, configuration)


if __name__ == "__main__":
    main()
