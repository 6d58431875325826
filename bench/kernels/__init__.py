"""Triton kernels of the baselines, one and its launcher a file; built on the package's exact choice."""
