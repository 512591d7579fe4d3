"""The demo: a corpus from Python packages, a training run with gradient dot products, and a report."""
