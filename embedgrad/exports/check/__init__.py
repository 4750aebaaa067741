"""Compares an export in the target's own program with our engine."""
