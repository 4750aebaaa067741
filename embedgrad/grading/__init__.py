"""Graders: what in a generated text counts as the answer, and whether it is right."""
