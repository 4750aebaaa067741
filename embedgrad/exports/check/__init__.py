"""Holds an export against our own engine, by the target's own program."""
