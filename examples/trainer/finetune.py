"""Fine-tune a causal language model, and say which samples helped it: `finetune_plain.py` with four lines changed.

python examples/trainer/finetune.py
"""

import argparse
from pathlib import Path

from datasets import Dataset
from passages import load_data, load_model, tokenized
from transformers import DataCollatorForLanguageModeling, TrainingArguments

import ghostfunc as gf
from ghostfunc.trainer import GhostTrainer


def main() -> None:
    """Train, and say how large the validation loss is, and what each sample did to it."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="", help="a folder or a name on the hub; by default a small, new GPT-2")
    parser.add_argument("--output_dir", type=Path, default=Path("results/trainer"))
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--num_train_epochs", type=float, default=2)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    options = parser.parse_args()

    train, val = load_data()
    model, tokenizer = load_model(options.model, train["text"])
    args = TrainingArguments(
        str(options.output_dir),
        learning_rate=options.learning_rate,
        num_train_epochs=options.num_train_epochs,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        warmup_steps=5,
        logging_steps=10,
        save_steps=20,
        dataloader_pin_memory=False,
        report_to=[],
    )
    trainer = GhostTrainer(
        model,
        args,
        train_dataset=tokenized(train, tokenizer),
        eval_dataset=tokenized(val, tokenizer),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        val_batch=tokenized(val, tokenizer),
        ledger=options.output_dir / "values",
        precondition=gf.adam,
    )
    trainer.train(resume_from_checkpoint=options.resume or None)
    print(f"validation loss: {trainer.evaluate()['eval_loss']:.4f}")
    if trainer.ledger is not None and trainer.is_world_process_zero():
        report(trainer.ledger, train)


def report(ledger: gf.InRunShapley, train: Dataset) -> None:
    """Print the value of each kind of text, and the samples at both ends."""
    values = ledger.by_sample().to_pylist()
    total = sum(row["value"] for row in values)
    print(f"\nThe fall of the validation loss that the steps owe to their samples: {total:.3f}")
    for kind in dict.fromkeys(train["kind"]):
        own = [row["value"] for row in values if train[row["sample_id"]]["kind"] == kind]
        print(f"  {kind:<7} {sum(own):+.3f}")
    for title, rows in (("helpful", ledger.top(5)), ("harmful", ledger.top(5, harmful=True))):
        print(f"\nMost {title}:")
        for row in rows.to_pylist():
            sample = train[row["sample_id"]]
            print(f"  {row['value']:+.5f}  {sample['kind']:<7} {' '.join(sample['text'].split())[:80]}")


if __name__ == "__main__":
    main()
