"""What each process of tests/test_trainer.py runs: trainings with values and without, by Trainers and by own loops."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from trainer_world import Texts, arguments, gpt2, weights
from transformers import Trainer

import ghostfunc as gf
from ghostfunc.trainer import GhostTrainer

TRAIN, VAL = Texts(12, 1), Texts(5, 2)


def trainer(kind: type[Trainer], folder: Path, train: Any = TRAIN, **ghost: Any) -> Any:
    args = arguments(
        folder / kind.__name__,
        num_train_epochs=2,
        gradient_accumulation_steps=2,
        ddp_backend="gloo",
        save_strategy="steps",
        save_steps=1,
    )
    return kind(gpt2(), args, train_dataset=train, **ghost)


def rows(data: Texts) -> dict[str, Tensor]:
    names = ("input_ids", "attention_mask", "labels")
    return {name: torch.stack([item[name] for item in data.items]) for name in names}


def own_loop(*, with_engine: bool) -> dict[str, Tensor]:
    """The weights after a loop under accelerate, with gradient accumulation and clipping."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = gpt2()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    table = rows(TRAIN)
    items = [{name: column[i] for name, column in table.items()} for i in range(len(TRAIN))]
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(items, batch_size=3))  # type: ignore[arg-type]
    engine = gf.GradDotProdEngine(model, rows(VAL), optimizer=optimizer)
    for batch in loader:
        with accelerator.accumulate(model):
            if with_engine:
                loss = engine(**batch).loss
            else:
                inputs = {name: column for name, column in batch.items() if name != "labels"}
                loss = gf.causal_lm_loss(model(**inputs), batch).mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                if with_engine:
                    engine.prepare_gradients()
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    return weights(accelerator.unwrap_model(model))


def main(folder: Path) -> None:
    results: dict[str, Tensor] = {}

    def keep(what: str, model: dict[str, Tensor]) -> None:
        results.update({f"{what}/{name}": tensor for name, tensor in model.items()})

    ghost = {"val_batch": VAL, "ledger": folder / "values"}
    for kind, options in ((GhostTrainer, ghost), (Trainer, {})):
        with_values = trainer(kind, folder, **options)
        with_values.train()
        keep(kind.__name__, weights(with_values.model))
    rank = dist.get_rank()
    before = gf.InRunShapley(folder / "values").by_sample().to_pylist()
    dist.barrier()  # no rank may cut the ledger back before the other has read it
    resumed = trainer(GhostTrainer, folder, **ghost)
    resumed.train(resume_from_checkpoint=str(folder / "GhostTrainer" / "checkpoint-1"))
    keep("resumed", weights(resumed.model))
    told = {"before": before, "after": gf.InRunShapley(folder / "values").by_sample().to_pylist()}

    spoilt = Texts(12, 1)
    if rank == 1:
        for item in spoilt.items:
            item["labels"][:] = 99  # no token has this number
    try:
        trainer(GhostTrainer, folder / "spoilt", spoilt, val_batch=VAL).train()
    except Exception as error:
        told["error"] = f"{type(error).__name__}: {error}"
    for with_engine in (True, False):
        keep(f"engine {with_engine}", own_loop(with_engine=with_engine))
    save_file(results, folder / f"weights-{rank}.safetensors")
    (folder / f"told-{rank}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
