"""The backend without a compiler: NumPy and BLAS, with jitted kernels for the ops that they speed up."""

from __future__ import annotations

from .ops import NumbaProgram, compile, dense_backward_layer, dense_layer, own_ops, probe

__all__ = ["NumbaProgram", "compile", "dense_backward_layer", "dense_layer", "own_ops", "probe"]
