"""What each process of tests/test_trainer.py runs: the same training with values and without."""

import sys
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file
from trainer_world import Texts, arguments, gpt2, weights
from transformers import Trainer

from ghostfunc.trainer import GhostTrainer


def main(folder: Path) -> None:
    for kind, ghost in ((GhostTrainer, {"val_batch": Texts(5, 2), "ledger": folder / "values"}), (Trainer, {})):
        args = arguments(folder / kind.__name__, num_train_epochs=2, gradient_accumulation_steps=2, ddp_backend="gloo")
        trainer = kind(gpt2(), args, train_dataset=Texts(12, 1), **ghost)
        trainer.train()
        if dist.get_rank() == 0:
            save_file(weights(trainer.model), folder / f"{kind.__name__}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
