"""Where LMDeploy is, for tests that run it: BUILDSYS_LMDEPLOY, or this interpreter. It needs no GPU for quantizing."""

from __future__ import annotations

import os

import pytest

from buildsys.backends.lmdeploy import RELEASE
from buildsys.lite import process

WANTED = "lmdeploy" in os.environ.get("BUILDSYS_TEST_REQUIRE", "")

TEXT = """\
schema: 1
source: {local: {path: model}}
calibration:
  dataset: {text_files: {paths: [calibration.txt]}}
  samples: 8
  seqlen: 64
quantization: {bits: 4, method: [awq, rtn]}
format: awq
verify:
  text: {text_files: {paths: [verify.txt]}}
  samples: 16
  seqlen: 64
  kl: {max_nats: 0.5}
matrix:
  native: {}
  lmdeploy:
    quantization: {backend: lmdeploy}
  native8:
    quantization: {bits: 8, group_size: -1, symmetric: true, activations: int8, method: [smoothquant, rtn]}
    format: smooth_quant
  lmdeploy8:
    quantization: {bits: 8, group_size: -1, symmetric: true, activations: int8, method: [smoothquant, rtn], backend: lmdeploy}
    format: smooth_quant
"""
"""A recipe whose variants have one scheme and one text, and two quantizers."""


def needed() -> None:
    """Skips the test where the release that the backend pins is not here."""
    found = process.installed("tests")
    if found != RELEASE:
        (pytest.fail if WANTED else pytest.skip)(f"{process.interpreter()} has {found or 'no'} LMDeploy; the backend is {RELEASE}")
