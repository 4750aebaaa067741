"""Tests of embedgrad; the folders mirror the project."""
