"""Training: the loop over epochs, and checkpoints to resume it."""

from __future__ import annotations

from .checkpoint import Checkpoint, SavedRun, TrainingState
from .trainer import Block, Callback, EpochPrinter, Feed, Interrupted, Options, Progress, Trainer

__all__ = [
    "Block",
    "Callback",
    "Checkpoint",
    "EpochPrinter",
    "Feed",
    "Interrupted",
    "Options",
    "Progress",
    "SavedRun",
    "Trainer",
    "TrainingState",
]
