"""Running the command in this process, for the tests of the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from narrows import cli

SMALL = [
    "--components",
    "3",
    "--hidden",
    "8",
    "--epochs",
    "4",
    "--batch-size",
    "32",
    "--threads",
    "1",
    "--quiet",
]


def narrows(*args):
    return cli.main([str(a) for a in args])


def table(n=90, d=12, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, 3)) @ rng.normal(size=(3, d)) + 0.1 * rng.normal(size=(n, d))).astype(np.float32)


def metrics(out):
    return json.loads((Path(out) / "metrics.json").read_text())
