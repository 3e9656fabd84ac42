"""`ConvAutoencoder`: an autoencoder of images and signals, whose layers are convolutions.

- Rows are images or flattened images, with their channels last.
- `reconstruct` returns the shape that it was given.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from ..fitting.parameters import (
    choice,
    filter_counts,
    hidden_sizes,
    image_shape,
    integer,
    kernel_steps,
    pairs_by_layer,
)
from ..plan.activations import ACTIVATIONS
from ..plan.geometry import PADDINGS, Convolution, Image
from ..plan.losses import LossInfo
from ..plan.spec import LayerSpec
from ..rows.devices import gpu_array, on_gpu
from .autoencoder import Autoencoder
from .preset import preset

__all__ = ["ConvAutoencoder", "shape_of_images"]

Array = NDArray[Any]

_FIXED: dict[str, Any] = {
    "tied_weights": False,
    "contractive_hessian": 0.0,
    "n_corruptions": 1,
    "hessian_std": 0.1,
    "sparse_decoder": "auto",
}


@preset(fixed=_FIXED, hidden_layer_sizes=(), contractive_method="hutchinson")
class ConvAutoencoder(Autoencoder):
    """Convolutional autoencoder of images and signals (Masci et al., ICANN 2011).

    The encoder is a stack of convolutions, each with a bias, an activation and optional max pooling. Dense layers, if
    any, and the latent layer follow. The decoder mirrors the encoder. A transposed convolution reverses a stride.
    Repeated pixels before a convolution reverse pooling (Odena, Dumoulin and Olah, "Deconvolution and checkerboard
    artifacts", Distill, 2016).

    Parameters
    ----------
    n_components : int or None, default=32
        Width of the dense latent layer. None: there is no dense latent layer, and the code is the output of the
        encoder's last convolution, flattened with its channels last. `latent_shape_` is its shape, and
        `latent_activation` its activation.
    image_shape : (int, int, int) or (int, int), optional
        Height, width and channels of an image, or length and channels of a signal. One number may be -1: it follows
        from the size of X, so that (-1, 1) are signals of any length. None: the shape of X says it, if X holds images
        with at most 4 channels, (n_samples, height, width, channels), or square grey images (n_samples, side, side).
        Other shapes, and flattened images, need an `image_shape`.
    filters : int or sequence of int, default=(16, 32)
        Output channels of each convolution of the encoder.
    kernel_size : int or sequence, default=3
        Pixels that a convolution reads along height and width (of a signal, along its length). An integer sets all
        layers. A sequence has one item for each layer: an integer or a pair (height, width).
    strides : int or sequence, default=2
        Steps between the positions of the kernel, in the same form. Strides and pooling must divide the image.
    pooling : int or sequence, default=1
        Sides of the windows of max pooling, after the activation, in the same form.
    padding : {"same", "valid"}, default="same"
        ``"same"``: the image is padded with zeros, and its new size depends only on the strides. ``"valid"``: kernels
        stay inside the image; needs ``pooling=1``.
    hidden_layer_sizes, decoder_layer_sizes : int or sequence of int
        Widths of dense layers between the convolutions and the code, and back.
    activation : str, default="relu"
        Activation of all hidden layers, convolutions and dense ones.
    dropout : float, default=0.0
        Probability that a value of a hidden layer is dropped, after pooling.
    contractive : float, default=0.0
        Strength of the contractive penalty, as in `Autoencoder`; needs ``dropout=0``.
    contractive_method : {"hutchinson"}, default="hutchinson"
        An unbiased estimate of the penalty, from products of the Jacobian with random signs (Hutchinson, 1989).
        ``"exact"`` needs a dense encoder.
    n_probes : int, default=1
        Products for each row and step.
    loss, corruption, activity_l1, solver, ...
        As in `Autoencoder`, without tied weights and `contractive_hessian`.

    Attributes
    ----------
    coefs_ : list of ndarray
        Shape (kernel height, kernel width, channels in, channels out) for convolutions and transposed convolutions,
        (n_in, n_out) for dense layers. Dense layers read images flattened with their channels last.
    intercepts_ : list of ndarray
        One bias for each output channel of a convolution.
    image_shape_ : tuple of int
        `image_shape`, or what X said.
    latent_shape_ : tuple of int
        ``(n_components,)``, or height, width and channels of a convolutional code.
    history_, n_features_in_, ...
        As in `Autoencoder`; `n_features_in_` counts the values of a flattened image.

    Notes
    -----
    X, y and X_val of every method are flattened images (n_samples, n_features), which may be sparse or a source. Or
    they are arrays (n_samples, height, width, channels), for signals (n_samples, length, channels). Images of one
    channel may leave out the last dimension. Channels are last, as in Keras. An error says how to turn arrays with
    channels first, as in PyTorch. `transform` returns codes of two dimensions, `reconstruct` returns the shape of its
    X, `inverse_transform` returns flattened images. With ``precision="bfloat16"`` the products of dense layers are in
    bfloat16; convolutions stay in float32.

    Examples
    --------
    >>> import numpy as np
    >>> from narrows import ConvAutoencoder
    >>> images = np.random.default_rng(0).random((60, 8, 8, 1), dtype=np.float32)
    >>> ae = ConvAutoencoder(4, image_shape=(8, 8, 1), filters=(4,), max_iter=2, random_state=0).fit(images)
    >>> ae.transform(images).shape
    (60, 4)
    """

    _constraints = Autoencoder._constraints | {
        "n_components": integer(1, optional=True),
        "image_shape": image_shape,
        "filters": filter_counts,
        "kernel_size": kernel_steps,
        "strides": kernel_steps,
        "pooling": kernel_steps,
        "padding": choice(PADDINGS),
    }
    _takes_conditions = False

    image_shape: Any
    filters: Any
    kernel_size: Any
    strides: Any
    pooling: Any
    padding: Any
    image_shape_: tuple[int, ...]

    def __init__(
        self,
        n_components: int | None = 32,
        *,
        image_shape: Sequence[int] | None = None,
        filters: int | Sequence[int] = (16, 32),
        kernel_size: int | Sequence[int | tuple[int, int]] = 3,
        strides: int | Sequence[int | tuple[int, int]] = 2,
        pooling: int | Sequence[int | tuple[int, int]] = 1,
        padding: str = "same",
        **inherited: Any,
    ) -> None: ...

    @property
    def latent_shape_(self) -> tuple[int, ...]:
        """Height, width and channels of a convolutional code (a signal has height 1), or ``(n_components,)``."""
        spec = self._fitted_network().spec
        code = spec.layers[spec.latent - 1].convolution
        return (spec.n_components,) if code is None else code.out_shape

    def _check_together(self) -> None:
        super()._check_together()
        if self.image_shape is not None and -1 not in self.image_shape:
            n_features = math.prod(int(n) for n in self.image_shape)
            self._layers(n_features, n_features)

    def _check_counts(self, loss: LossInfo) -> None:
        super()._check_counts(loss)
        if several := self._several_heads(loss):
            raise ValueError(
                f"{several} needs dense output layers, and these are convolutions; 'poisson' and 'nb' take them"
            )

    def _check_contractive(self) -> None:
        convolutions = hidden_sizes("filters", self.filters)
        self._check_undropped(len(convolutions) + len(self._hidden_sizes()) + (self.n_components is not None), "")
        if self._exact_penalty():
            raise ValueError(
                f"{self._contractive_given()}, filters={self.filters!r}: contractive_method='exact' needs a dense "
                "encoder; contractive_method='hutchinson' takes convolutions"
            )

    def reconstruct(self, X: Any, *, batch: Any = None) -> Array:
        """Encode and decode images.

        Parameters
        ----------
        X : array, CSR / CSC, data frame or Source of shape (n_samples, n_features), or array of images
        batch
            Must be None.

        Returns
        -------
        ndarray of X's shape
            Dense, of X's dtype if that is float32 or float64, else the network's.
        """
        check_is_fitted(self)
        shape: tuple[int, ...] = getattr(X, "shape", ())
        rows = super().reconstruct(X, batch=batch)
        return rows.reshape(shape) if len(shape) > 2 else rows

    def _flat_rows(self, X: Any, name: str, learns: bool = False) -> Any:
        if isinstance(X, list | tuple):
            X = np.asarray(X)
        shape = tuple(int(n) for n in getattr(X, "shape", ()))
        if len(shape) < 2:
            return X
        sizes, n_features = shape[1:], math.prod(shape[1:])
        if learns:
            given = self.image_shape
            shown = getattr(X, "image_shape", None) or sizes
            self.image_shape_ = shape_of_images(name, shown) if given is None else _filled(given, n_features)
        if len(sizes) == 1:
            return X
        wanted = self.image_shape_
        if sizes != wanted and (*sizes, 1) != wanted:
            turned = sizes == (wanted[-1], *wanted[:-1])
            hint = f": channels are last here, pass {_channels_last(name)}" if turned else ""
            raise ValueError(f"{name} has images of shape {sizes}, not image_shape={wanted}{hint}")
        return np.reshape(gpu_array(X, name) if on_gpu(X) else X, (shape[0], n_features))

    def _shape_of(self, n_features: int) -> tuple[int, ...]:
        """The shape of rows of n_features values: the parameter's, or the one that X had in the fit."""
        if self.image_shape is not None:
            return _filled(self.image_shape, n_features)
        known: tuple[int, ...] | None = vars(self).get("image_shape_")
        return shape_of_images("X", (n_features,)) if known is None else known

    def _layers(self, n_features: int, n_outputs: int) -> tuple[tuple[LayerSpec, ...], int]:
        given = self._shape_of(n_features)
        signal = len(given) == 2
        shape: Image = (1, *given) if signal else given  # type: ignore[assignment]
        if n_outputs != n_features:
            raise ValueError(f"y has {n_outputs} columns, but a target must be images like X, of {n_features} values")
        activation, latent_activation = ACTIVATIONS[self.activation], ACTIVATIONS[self.latent_activation]
        encoder = self._encoder(shape, signal)
        dropout = float(self.dropout)
        layers = [LayerSpec(c.n_in, c.n_out, activation, dropout, convolution=c) for c in encoder]
        hidden, back = self._hidden_sizes(), self._decoder_sizes()
        if self.n_components is None:
            if hidden or back:
                raise ValueError(
                    f"n_components=None gives a convolutional code, which goes without hidden_layer_sizes="
                    f"{self.hidden_layer_sizes!r} and decoder_layer_sizes={self.decoder_layer_sizes!r}"
                )
            code = layers.pop()
            layers.append(LayerSpec(code.n_in, code.n_out, latent_activation, convolution=code.convolution))
            latent = len(layers)
        else:
            flat = encoder[-1].n_out
            widths = (flat, *hidden, int(self.n_components), *back, flat)
            latent = len(layers) + len(hidden) + 1
            for n_in, n_out in itertools.pairwise(widths):
                at_code = len(layers) == latent - 1
                layers.append(
                    LayerSpec(n_in, n_out, latent_activation if at_code else activation, 0.0 if at_code else dropout)
                )
        decoder = [_mirrored(c, self.padding) for c in encoder[::-1]]
        layers += [LayerSpec(c.n_in, c.n_out, activation, dropout, convolution=c) for c in decoder[:-1]]
        last = decoder[-1]
        return (*layers, LayerSpec(last.n_in, last.n_out, self._output(), convolution=last)), latent

    def _encoder(self, shape: Image, signal: bool) -> list[Convolution]:
        filters = hidden_sizes("filters", self.filters)
        given = shape[1:] if signal else shape
        kernels, strides, pools = (
            pairs_by_layer(name, getattr(self, name), len(filters), signal)
            for name in ("kernel_size", "strides", "pooling")
        )
        layers: list[Convolution] = []
        for i, (n, kernel, stride, pool) in enumerate(zip(filters, kernels, strides, pools, strict=True)):
            where = f"image_shape={given}, convolution {i + 1} of {len(filters)}"
            if self.padding == "valid" and pool != (1, 1):
                raise ValueError(f"padding='valid' needs pooling=1, not pooling={self.pooling!r}")
            for size, k, s, p in zip(shape[:2], kernel, stride, pool, strict=True):
                step = size - k if self.padding == "valid" else size
                if step >= 0 and step % (s * p):
                    steps = f"strides of {stride[0]} x {stride[1]}"
                    steps += f" and pools of {pool[0]} x {pool[1]}" if pool != (1, 1) else ""
                    steps += f" with kernels of {kernel[0]} x {kernel[1]}" if self.padding == "valid" else ""
                    raise ValueError(f"{where}: {steps} do not divide an image of {shape[0]} x {shape[1]} pixels")
            try:
                layers.append(Convolution.of(shape, n, kernel, strides=stride, padding=self.padding, pool=pool))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            shape = layers[-1].out_shape
        return layers


def _filled(image_shape: Sequence[int], n_features: int) -> tuple[int, ...]:
    """`image_shape` for rows of n_features values, with the number that -1 stands for."""
    shape = tuple(int(n) for n in image_shape)
    known = math.prod(n for n in shape if n != -1)
    if -1 in shape and n_features % known == 0:
        shape = tuple(n_features // known if n == -1 else n for n in shape)
    if math.prod(shape) != n_features:
        values = f"does not divide the {n_features}" if -1 in shape else f"has {known} values, X has {n_features}"
        raise ValueError(f"image_shape={shape} {values} features")
    return shape


def _channels_last(name: str) -> str:
    """The call that puts channels last in X, or in the array of a file."""
    return f"np.moveaxis({name if name.isidentifier() else 'array'}, 1, -1)"


def shape_of_images(name: str, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of images whose array has these sizes after the first; ValueError if `image_shape` must say it."""
    if len(sizes) == 1:
        (n,) = sizes
        sides = {channels: math.isqrt(n // channels) for channels in (1, 3)}
        image = next(((side, side, c) for c, side in sides.items() if side > 1 and c * side * side == n), None)
        shown = "(height, width, channels)" if image is None else str(image)
        raise ValueError(
            f"{name} has rows of {n} values: set image_shape={shown} if they are images, or image_shape=({n}, 1) if "
            "they are signals"
        )
    few = 4  # channels at most: grey, colour, colour with transparency
    if len(sizes) == 2:
        a, b = sizes
        if a == b:
            return a, b, 1
        turn = f"{_channels_last(name)} with image_shape=({b}, {a}) if they are signals of {a} channels"
        if a <= few:
            raise ValueError(f"{name} has rows of shape {sizes}, and channels are last here: pass {turn}")
        raise ValueError(
            f"{name} has rows of shape {sizes}: set image_shape=({a}, {b}, 1) if they are grey images, or "
            f"image_shape=({a}, {b}) if they are signals of {b} channels"
        )
    if len(sizes) == 3:
        a, b, c = sizes
        first = a <= few and (c > few or (b == c and a != b))
        if c <= few and not first:
            return a, b, c
        turned = _channels_last(name)
        if first:
            raise ValueError(
                f"{name} has images of shape {sizes}, with channels first: pass {turned}, which puts them last"
            )
        raise ValueError(
            f"{name} has images of shape {sizes}: set image_shape={sizes} if channels are last, or pass {turned} with "
            f"image_shape=({b}, {c}, {a})"
        )
    raise ValueError(f"{name} has rows of shape {sizes}: images have shape (height, width, channels)")


def _mirrored(conv: Convolution, padding: str) -> Convolution:
    """The decoder's layer that turns the output shape of an encoder's layer into its input shape."""
    if conv.pooled or (conv.strides == (1, 1) and padding == "same"):
        up = conv.strides[0] * conv.pool[0], conv.strides[1] * conv.pool[1]
        return Convolution.of(conv.out_shape, conv.shape[2], conv.kernel, padding=padding, upsample=up)
    return Convolution.of(
        conv.out_shape, conv.shape[2], conv.kernel, strides=conv.strides, padding=padding, transposed=True
    )
