"""Tests of what the questions share."""
