"""Compares an optimised prompt with control prompts on the same test items."""
