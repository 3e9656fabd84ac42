"""The jitted kernels of convolutions and poolings of the Numba backend.

Images are arrays (rows, height, width, channels), C-contiguous. Promises and limits are those of `kernels`.
"""

from __future__ import annotations

from typing import Any

from .kernels import _EXACT, _kernel


@_kernel(_EXACT)
def patches(wide: Any, out: Any, height: int, width: int, ky: int, kx: int, sy: int, sx: int, py: int, px: int) -> None:
    """One row of `out` for each window of each image: its pixels, with zeros outside the image."""
    n, h, w, c = wide.shape
    for i in range(n):
        for y in range(height):
            for x in range(width):
                row = out[(i * height + y) * width + x]
                at = 0
                for a in range(ky):
                    v = sy * y + a - py
                    for b in range(kx):
                        u = sx * x + b - px
                        if 0 <= v < h and 0 <= u < w:
                            for k in range(c):
                                row[at + k] = wide[i, v, u, k]
                        else:
                            for k in range(c):
                                row[at + k] = 0
                        at += c


@_kernel(_EXACT)
def fold(parts: Any, wide: Any, height: int, width: int, ky: int, kx: int, sy: int, sx: int, py: int, px: int) -> None:
    """The adjoint of `patches`: each value is added to the pixel it came from."""
    n, h, w, c = wide.shape
    wide[:] = 0
    for i in range(n):
        for y in range(height):
            for x in range(width):
                row = parts[(i * height + y) * width + x]
                at = 0
                for a in range(ky):
                    v = sy * y + a - py
                    for b in range(kx):
                        u = sx * x + b - px
                        if 0 <= v < h and 0 <= u < w:
                            for k in range(c):
                                wide[i, v, u, k] += row[at + k]
                        at += c


@_kernel(_EXACT)
def max_windows(x: Any, py: int, px: int, out: Any, first: Any) -> None:
    """The greatest value of each window of images (any, height, width), and its index; the first of equal ones."""
    for i in range(out.shape[0]):
        for y in range(out.shape[1]):
            for u in range(out.shape[2]):
                best, at = x[i, y * py, u * px], 0
                for k in range(1, py * px):
                    v = x[i, y * py + k // px, u * px + k % px]
                    if v > best or (v != v and best == best):
                        best, at = v, k
                out[i, y, u] = best
                first[i, y, u] = at


@_kernel(_EXACT)
def unpool(d: Any, first: Any, py: int, px: int, out: Any) -> None:
    out[:] = 0
    for i in range(d.shape[0]):
        for y in range(d.shape[1]):
            for u in range(d.shape[2]):
                k = first[i, y, u]
                out[i, y * py + k // px, u * px + k % px] = d[i, y, u]


@_kernel(_EXACT)
def pick(images: Any, first: Any, py: int, px: int, out: Any) -> None:
    """The adjoint of `unpool`."""
    for i in range(out.shape[0]):
        for y in range(out.shape[1]):
            for u in range(out.shape[2]):
                k = first[i, y, u]
                out[i, y, u] = images[i, y * py + k // px, u * px + k % px]
