"""Triton kernels for a frozen transformer whose only trainable input is a prompt: one operation per file."""
