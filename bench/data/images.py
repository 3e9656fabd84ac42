"""Images of MNIST and Fashion-MNIST from their files."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Split:
    """Rows to train on and rows held out, each with a label."""

    X: NDArray[np.float32]
    labels: NDArray[np.uint8]
    X_held: NDArray[np.float32]
    labels_held: NDArray[np.uint8]


def mnist(data: Path, folder: str = "mnist") -> Split:
    """60000 images to train on and 10000 held out, pixels from 0 to 1; of Fashion-MNIST if that is the folder.

    The files are in the idx format: a header of 16 or 8 bytes, then one byte for each pixel or label.
    """

    def read(name: str, header: int) -> NDArray[np.uint8]:
        with gzip.open(data / folder / name) as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)

    def images(name: str) -> NDArray[np.float32]:
        return read(f"{name}-images-idx3-ubyte.gz", 16).reshape(-1, 784).astype(np.float32) / np.float32(255)

    def labels(name: str) -> NDArray[np.uint8]:
        return read(f"{name}-labels-idx1-ubyte.gz", 8)

    return Split(images("train"), labels("train"), images("t10k"), labels("t10k"))


def principal_axes(X: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and principal axes (columns), the axis of the largest variance first."""
    mean = X.mean(axis=0, dtype=np.float64)
    centred = X - mean
    return mean, np.linalg.eigh(centred.T @ centred)[1][:, ::-1]
