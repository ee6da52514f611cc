"""Arithmetic on tensors: forwards, statistics, grids, rounding, scores. Nothing here knows a recipe or a vendor."""

VERSION = 3
"""Bumped when any output of this folder changes for equal input (tests/quant/test_version.py notices); it is in every key that computes."""
