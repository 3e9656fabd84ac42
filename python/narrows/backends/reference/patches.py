"""Convolutions and poolings of whole batches as their formulas, in NumPy.

Promises: works in the dtype of its arrays; names follow `ops.GEOMETRY`.
Never: knows plans.

A convolution and its adjoint relate a wide image to a narrow one. Element (ky, kx) of the kernel joins the narrow pixel
y to the wide pixel stride * y + ky - pad. A convolution reads the wide image and writes the narrow one. A transposed
convolution does the opposite.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...plan.geometry import Convolution
from ...plan.ops import GEOMETRY

__all__ = ["Images", "Pooling", "pixels"]

Array = NDArray[Any]
X_LAST, OUT_LAST = 1, 2


def pixels(rows: Array, height: int, width: int, channels: int, last: int) -> Array:
    """Rows as images, shape (rows, height, width, channels): a view."""
    if last:
        return rows.reshape(len(rows), height, width, channels)
    return rows.reshape(len(rows), channels, height, width).transpose(0, 2, 3, 1)


class Images:
    """The geometry of an op, and its slots as images.

    Parameters
    ----------
    **values : int
        Values with the names of `ops.GEOMETRY`.
    """

    def __init__(self, **values: int) -> None:
        h, w, c, oh, ow, f, ky, kx, sy, sx, py, px, uy, ux, transposed, self.layout = (values[n] for n in GEOMETRY)
        self.conv = Convolution(
            (h, w, c), f, (ky, kx), (sy, sx), (py, px), (oh, ow), (uy, ux), transposed=bool(transposed)
        )

    @classmethod
    def of(cls, conv: Convolution) -> Images:
        """The geometry for images with their channels last."""
        values = (*conv.shape, *conv.size, conv.filters, *conv.kernel, *conv.strides, *conv.padding, *conv.upsample)
        return cls(**dict(zip(GEOMETRY, (*values, conv.transposed, X_LAST | OUT_LAST), strict=True)))

    def x(self, rows: Array) -> Array:
        return pixels(rows, *self.conv.shape, self.layout & X_LAST)

    def out(self, rows: Array) -> Array:
        return pixels(rows, *self.conv.image, self.layout & OUT_LAST)

    def kernel(self, W: Array) -> Array:
        """The weight as (kernel row, kernel column, wide channel, narrow channel)."""
        K = W.reshape(*self.conv.kernel, self.conv.shape[2], self.conv.filters)
        return K.transpose(0, 1, 3, 2) if self.conv.transposed else K

    def convolve(self, x: Array, W: Array) -> Array:
        """The convolution of images (rows, height, width, channels), without its bias."""
        if self.conv.transposed:
            return self.scatter(x, self.kernel(W), self.conv.size)
        return self.gather(self.upsampled(x), self.kernel(W), self.conv.size)

    def adjoint(self, dz: Array, W: Array) -> Array:
        """The derivative by x, from the derivative by the convolution's output."""
        h, w, c = self.conv.shape
        if self.conv.transposed:
            return self.gather(dz, self.kernel(W), (h, w))
        uy, ux = self.conv.upsample
        wide = self.scatter(dz, self.kernel(W), (h * uy, w * ux))
        total: Array = wide.reshape(len(dz), h, uy, w, ux, c).sum(axis=(2, 4))
        return total

    def gradient(self, x: Array, dz: Array) -> Array:
        """The derivative by W."""
        wide, narrow = (dz, x) if self.conv.transposed else (self.upsampled(x), dz)
        padded = self._padded(wide, narrow.shape[1:3])
        K = np.empty((*self.conv.kernel, wide.shape[3], narrow.shape[3]), x.dtype)
        flat = np.ascontiguousarray(narrow).reshape(-1, narrow.shape[3])
        for ky, kx, part in self._parts(padded, narrow.shape[1:3]):
            K[ky, kx] = np.ascontiguousarray(part).reshape(-1, wide.shape[3]).T @ flat
        if self.conv.transposed:
            K = K.transpose(0, 1, 3, 2)
        return K.reshape(self.conv.weight_shape)

    def upsampled(self, x: Array) -> Array:
        uy, ux = self.conv.upsample
        return x.repeat(uy, axis=1).repeat(ux, axis=2) if (uy, ux) != (1, 1) else x

    def gather(self, wide: Array, K: Array, size: tuple[int, int]) -> Array:
        out = np.zeros((len(wide), *size, K.shape[3]), wide.dtype)
        for ky, kx, part in self._parts(self._padded(wide, size), size):
            out += part @ K[ky, kx]
        return out

    def scatter(self, narrow: Array, K: Array, size: tuple[int, int]) -> Array:
        (py, px), (h, w) = self.conv.padding, size
        padded = self._padded(np.zeros((len(narrow), h, w, K.shape[2]), narrow.dtype), narrow.shape[1:3])
        for ky, kx, part in self._parts(padded, narrow.shape[1:3]):
            part += narrow @ K[ky, kx].T
        out = np.zeros((len(narrow), h, w, K.shape[2]), narrow.dtype)
        inside = padded[:, py : py + h, px : px + w]
        out[:, : inside.shape[1], : inside.shape[2]] = inside
        return out

    def _padded(self, wide: Array, narrow: tuple[int, ...]) -> Array:
        """The wide image with zeros around it, as far as the windows reach."""
        (ky, kx), (sy, sx), (py, px) = self.conv.kernel, self.conv.strides, self.conv.padding
        n, _, _, c = wide.shape
        out = np.zeros((n, (narrow[0] - 1) * sy + ky, (narrow[1] - 1) * sx + kx, c), wide.dtype)
        inside = out[:, py : py + wide.shape[1], px : px + wide.shape[2]]
        inside[...] = wide[:, : inside.shape[1], : inside.shape[2]]
        return out

    def _parts(self, padded: Array, narrow: tuple[int, ...]) -> Any:
        """For each kernel element, a view of the wide pixels that it reads."""
        (ky, kx), (sy, sx) = self.conv.kernel, self.conv.strides
        for i in range(ky):
            for j in range(kx):
                yield (
                    i,
                    j,
                    padded[:, i : i + narrow[0] * sy : sy, j : j + narrow[1] * sx : sx][:, : narrow[0], : narrow[1]],
                )


class Pooling(NamedTuple):
    """The integers of a pooling, named as in `ops.POOLING`, and its slots as images (rows, height, width, channels)."""

    h: int
    w: int
    c: int
    pool_y: int
    pool_x: int
    layout: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the output."""
        return self.h // self.pool_y, self.w // self.pool_x

    def x(self, rows: Array) -> Array:
        return pixels(rows, self.h, self.w, self.c, 0)

    def out(self, rows: Array) -> Array:
        return pixels(rows, *self.size, self.c, self.layout & OUT_LAST)

    def windows(self, x: Array) -> Array:
        """The windows of images: (rows, height, width, pixels of a window, channels)."""
        height, width = self.size
        split = x.reshape(-1, height, self.pool_y, width, self.pool_x, self.c).transpose(0, 1, 3, 2, 4, 5)
        return split.reshape(-1, height, width, self.pool_y * self.pool_x, self.c)

    def greatest(self, x: Array) -> Array:
        """Where a pixel is the (first) greatest of its window; bool, with x's shape."""
        first = self.windows(x).argmax(axis=3)
        chosen = first[:, :, :, None] == np.arange(self.pool_y * self.pool_x)[:, None]
        split = chosen.reshape(-1, *self.size, self.pool_y, self.pool_x, self.c).transpose(0, 1, 3, 2, 4, 5)
        where: Array = split.reshape(x.shape)
        return where
