"""buildsys: the build system for quantized language models."""

__version__ = "0.1.0"
