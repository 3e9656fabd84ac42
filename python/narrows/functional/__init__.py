"""Single fused layers and the contractive penalty, for libraries that bring their own model."""

from __future__ import annotations

from .layer import DenseGrads, dense, dense_backward
from .penalty import Penalty, contractive_penalty

__all__ = ["DenseGrads", "Penalty", "contractive_penalty", "dense", "dense_backward"]
