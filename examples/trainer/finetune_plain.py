"""Fine-tune a causal language model: an ordinary script, which `finetune.py` adds the value of each sample to.

python examples/trainer/finetune_plain.py
"""

import argparse
from pathlib import Path

from passages import load_data, load_model, tokenized
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments


def main() -> None:
    """Train, and say how large the validation loss is."""
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
    trainer = Trainer(
        model,
        args,
        train_dataset=tokenized(train, tokenizer),
        eval_dataset=tokenized(val, tokenizer),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train(resume_from_checkpoint=options.resume or None)
    print(f"validation loss: {trainer.evaluate()['eval_loss']:.4f}")


if __name__ == "__main__":
    main()
