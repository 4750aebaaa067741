"""Evaluation harnesses of others on our engine."""
