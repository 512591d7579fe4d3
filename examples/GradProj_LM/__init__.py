"""Project the gradient of every sample of a corpus into a store."""
