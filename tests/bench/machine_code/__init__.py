"""Tests of the compiled and executed kernels, and of what reads and runs them."""
