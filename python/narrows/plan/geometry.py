"""Geometry of convolutions: sizes, strides, and padding.

Promises: plain numbers; an impossible shape is a ValueError that names it.
Never: touches data or knows an op.

An image is (height, width, channels); a signal is an image of height 1. The output pixel y of a convolution reads the
input from ``stride * y - padding`` on, `kernel` pixels, with zeros outside. A transposed convolution is its adjoint:
input pixel y writes there. Source of the arithmetic: Dumoulin and Visin, "A guide to convolution arithmetic for deep
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
    """A convolutional layer: nearest upsampling, the convolution, and max pooling.

    Attributes
    ----------
    shape : (int, int, int)
        Height, width, and channels of the input image.
    filters : int
        Channels of the output image.
    kernel, strides : (int, int)
        Along height and width.
    padding : (int, int)
        Rows and columns of zeros before the image; after it there are as many as the last window reads.
    size : (int, int)
        Height and width of the convolution's output, before pooling.
    upsample : (int, int)
        Times that each row and column is repeated before the convolution.
    pool : (int, int)
        Rows and columns of a pooling window, after the activation; they divide `size`.
    transposed : bool
        Whether the layer is the adjoint of a convolution; it has no upsampling then.
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

        ``"same"``: one output for each stride; each window is centered on its pixel (windows of even length lie half a
        pixel further). A transposed convolution has `strides` times as many outputs as inputs. ``"valid"``: windows
        lie inside the image.

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
                    "pixels: use padding='same' or a smaller kernel"
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
        """Shape of the convolution's output, before pooling."""
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
        """Inputs that each output sums, and outputs that each input enters: on average, without the borders."""
        n_in, n_out = self.weight_shape[0], self.kernel[0] * self.kernel[1] * self.filters
        steps = self.strides[0] * self.strides[1]
        return (n_in / steps, n_out) if self.transposed else (n_in, n_out / steps)

    @property
    def flops(self) -> int:
        """Operations for one image; the output, the input gradient, and the weight gradient cost the same."""
        pixels = math.prod(self.shape[:2] if self.transposed else self.size)
        return 2 * pixels * math.prod(self.weight_shape)
