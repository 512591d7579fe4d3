"""From text to the token files that `shared.dataloader` reads."""
