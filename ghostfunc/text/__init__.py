"""Text: documents out of files, tokens out of documents, samples out of tokens."""
