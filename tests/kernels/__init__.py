"""Tests of the Triton kernels, in Triton's interpreter or on a GPU; see harness.py."""
