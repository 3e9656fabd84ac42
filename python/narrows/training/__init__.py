"""Training: the loop over epochs, callbacks, and checkpoints to resume it."""

from __future__ import annotations

from .callbacks import Callback, EpochPrinter, Progress, ProgressBar
from .checkpoint import Checkpoint, SavedRun, TrainingState
from .trainer import Block, Feed, Interrupted, Options, Trainer

__all__ = [
    "Block",
    "Callback",
    "Checkpoint",
    "EpochPrinter",
    "Feed",
    "Interrupted",
    "Options",
    "Progress",
    "ProgressBar",
    "SavedRun",
    "Trainer",
    "TrainingState",
]
