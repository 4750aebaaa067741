"""Benchmarks: one file per question asked; `python -m bench NAME` answers it."""
