"""A fine-tuning script of transformers, plain and with the value of each sample."""
