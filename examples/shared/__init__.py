"""What the language-model examples share: data files and their loader, models, training helpers."""
