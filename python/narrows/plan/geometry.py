"""Geometry of convolutions: sizes, strides, padding, and what does not fit together.

Promises: plain numbers; a shape that cannot be is a ValueError that names it.
Never: touches data or knows an op.

An image is (height, width, channels); a signal is an image of height 1. The output pixel y of a convolution reads the
input from ``stride * y - padding`` on, `kernel` pixels, zeros outside. A transposed convolution is its adjoint: input
pixel y writes there. Source of the arithmetic: Dumoulin and Visin, "A guide to convolution arithmetic for deep
learning", 2016.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["PADDINGS", "Convolution", "Image"]

Image = tuple[int, int, int]
"""Height, width and channels."""
Pair = tuple[int, int]

PADDINGS = ("same", "valid")


@dataclass(frozen=True)
class Convolution:
    """What a convolutional layer does to images: nearest upsampling, the convolution, max pooling.

    Attributes
    ----------
    shape : (int, int, int)
        Height, width and channels of the image it is given.
    filters : int
        Channels of the image it puts out.
    kernel, strides : (int, int)
        Along height and width.
    padding : (int, int)
        Rows and columns of zeros before the first; behind the last there are as many as are read.
    size : (int, int)
        Height and width of the convolution's output, before pooling.
    upsample : (int, int)
        How often each row and column is repeated before the convolution.
    pool : (int, int)
        Rows and columns of which the greatest is taken after the activation; divides `size`.
    transposed : bool
        Whether it is the adjoint of a convolution; goes without upsampling.
    """

    shape: Image
    filters: int
    kernel: Pair
    strides: Pair
    padding: Pair
    size: Pair
    upsample: Pair = (1, 1)
    pool: Pair = (1, 1)
    transposed: bool = False

    @classmethod
    def of(
        cls,
        shape: Image,
        filters: int,
        kernel: Pair,
        *,
        strides: Pair = (1, 1),
        padding: str = "same",
        upsample: Pair = (1, 1),
        pool: Pair = (1, 1),
        transposed: bool = False,
    ) -> Convolution:
        """The geometry with ``"same"`` or ``"valid"`` padding.

        ``"same"``: as many outputs as strides from pixel to pixel, each window centred on its pixel (one of even length
        half a pixel further); transposed, `strides` times as many. ``"valid"``: windows inside the image alone.

        Raises
        ------
        ValueError
            A kernel larger than the image under ``"valid"``, or pools that do not divide their image.
        """
        size, before = [], []
        for axis, (n, k, s, u) in enumerate(zip(shape[:2], kernel, strides, upsample, strict=True)):
            n *= u
            if padding == "valid" and not transposed and k > n:
                raise ValueError(
                    f"kernel {kernel} is larger than the image of {shape[0] * upsample[0]} x {shape[1] * upsample[1]} "
                    "pixels, which padding='valid' does not take"
                )
            if transposed:
                size.append(n * s if padding == "same" else (n - 1) * s + k)
            else:
                size.append(-(-n // s) if padding == "same" else (n - k) // s + 1)
            before.append((k - 1) // 2 if padding == "same" else 0)
            if size[axis] % pool[axis]:
                raise ValueError(f"pools of {pool[0]} x {pool[1]} do not divide an image of {tuple(size)} pixels")
        return cls(
            shape, filters, kernel, strides, (before[0], before[1]), (size[0], size[1]), upsample, pool, transposed
        )

    @property
    def pooled(self) -> bool:
        return self.pool != (1, 1)

    @property
    def image(self) -> Image:
        """Of the convolution's output, before pooling."""
        return (*self.size, self.filters)

    @property
    def out_shape(self) -> Image:
        return self.size[0] // self.pool[0], self.size[1] // self.pool[1], self.filters

    @property
    def n_in(self) -> int:
        return math.prod(self.shape)

    @property
    def n_out(self) -> int:
        return math.prod(self.out_shape)

    @property
    def weight_shape(self) -> Pair:
        """Rows are in the order (kernel row, kernel column, input channel)."""
        return self.kernel[0] * self.kernel[1] * self.shape[2], self.filters

    @property
    def fans(self) -> tuple[float, float]:
        """How many inputs an output is the sum of, and the other way round, on average and but for borders."""
        n_in, n_out = self.weight_shape[0], self.kernel[0] * self.kernel[1] * self.filters
        steps = self.strides[0] * self.strides[1]
        return (n_in / steps, n_out) if self.transposed else (n_in, n_out / steps)

    @property
    def flops(self) -> int:
        """Operations for one image, of its output, its input gradient or its weight gradient alike."""
        pixels = math.prod(self.shape[:2] if self.transposed else self.size)
        return 2 * pixels * math.prod(self.weight_shape)
