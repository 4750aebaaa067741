"""Graders read the answer from a generated text and decide whether it is right."""
