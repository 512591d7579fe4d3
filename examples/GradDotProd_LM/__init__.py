"""Gradient dot products of every training sample while a GPT-2 trains."""
