"""Discrete search: prompts of tokens instead of embeddings, found with the same gradient, on a budget of tokens."""
