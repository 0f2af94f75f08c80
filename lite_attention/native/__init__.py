"""Loaders of the compiled kernels: `cpu` for ``csrc/cpu``, `cuda` for ``csrc/sm90``. Both are optional."""
