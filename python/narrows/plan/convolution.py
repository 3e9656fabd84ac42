"""Lowering of convolutional layers: the forward pass, the backward pass, and the gradients of their weights.

Promises: data, codes, and the inputs and outputs of dense layers have their channels last. Between two convolutions,
rows hold one channel after the other.
Never: touches data or knows a backend.

A layer is nearest upsampling, the convolution with its bias and activation, and max pooling. The convolution upsamples
while it reads its input. The gradient by a weight is a sum over rows and pixels. Each grain of rows has its own partial
sums, and the update adds them in order.
"""

from __future__ import annotations

from collections.abc import Mapping

from .oplist import OpList
from .ops import GEOMETRY, POOLING, OpCode, padded
from .plan import LEARN, Mode, Region
from .spec import Activation, NetworkSpec

__all__ = ["Convolutions", "check_convolutions"]

X_LAST, OUT_LAST = 1, 2


def check_convolutions(spec: NetworkSpec) -> None:
    """Raise ValueError if convolutional layers do not fit together or with the rest of the network.

    Raises
    ------
    ValueError
    """
    layers = spec.layers
    for i, layer in enumerate(layers):
        conv, before = layer.convolution, layers[i - 1].convolution if i > 0 else None
        if conv is None:
            continue
        if (conv.n_in, conv.n_out) != (layer.n_in, layer.n_out):
            raise ValueError(
                f"layer {i} has images of {conv.n_in} and {conv.n_out} values in rows of {layer.n_in} and {layer.n_out}"
            )
        if before is not None and before.out_shape != conv.shape:
            raise ValueError(f"layer {i} reads images {conv.shape}, layer {i - 1} writes {before.out_shape}")
        if layer.tied_to is not None:
            raise ValueError(f"layer {i}: a convolution cannot have a tied weight")
    if any(layer.tied_to is not None and layers[layer.tied_to].convolution for layer in layers):
        raise ValueError("a dense layer cannot be tied to a convolution")
    if layers[-1].convolution is not None and layers[-1].convolution.pooled:
        raise ValueError(f"the output layer takes no pooling, but has {layers[-1].convolution.pool}")
    if spec.variational and layers[spec.latent - 1].convolution is not None:
        raise ValueError("the latent layer of a variational network is dense, not a convolution")


class Convolutions:
    """Writes the convolutional layers of a network into its op list.

    Parameters
    ----------
    low : OpList
    spec : NetworkSpec
    weights : list of str
        Slots of the layers' weights.
    """

    def __init__(self, low: OpList, spec: NetworkSpec, weights: list[str]) -> None:
        self.low = low
        self.spec = spec
        self.weights = weights
        self.unpooled: dict[int, tuple[str, str]] = {}
        """For layers with pooling: the slots of the pooling's input, and of what the derivative is computed from."""
        self.partials: dict[int, str] = {}
        """Slots of the partial sums of weight gradients that are begun."""

    def forward(self, i: int, modes: Mode, x: str) -> tuple[str, str]:
        """Write layer i; return the slot of its output, and the slot that its derivative is computed from."""
        low, layer = self.low, self.spec.layers[i]
        conv = layer.convolution
        assert conv is not None
        activation = Activation.LINEAR if i == len(self.spec.layers) - 1 else layer.activation
        size = conv.size[0] * conv.size[1] * conv.filters
        out = low.rows(f"{'c' if conv.pooled else 'a'}{i}", size)
        pre = low.rows(f"z{i}", size) if activation.needs_preactivation else None
        low.op(
            OpCode.CONVOLVE,
            modes,
            {"x": x, "W": self.weights[i], "b": f"b{i}", "out": out, "pre": pre},
            activation=activation,
            **self._geometry(i),
        )
        if not conv.pooled:
            return out, pre or out
        self.unpooled[i] = out, pre or out
        pooled = low.rows(f"a{i}", conv.n_out)
        low.op(OpCode.MAXPOOL, modes, {"x": out, "out": pooled}, **self._pooling(i))
        return pooled, pooled

    def dgrad(
        self, i: int, dz: str, saved: str, out: str, scale: float = 1.0, activation: Activation = Activation.LINEAR
    ) -> None:
        """Write the gradient by the pre-activations of the layer before layer i, which has this activation.

        If that layer is linear or pooled, it is the gradient by its output.
        """
        self.low.op(
            OpCode.CONV_DGRAD,
            LEARN,
            {"dz": dz, "W": self.weights[i], "saved": saved, "out": out},
            activation=activation,
            scale=scale,
            **self._geometry(i),
        )

    def unpool(self, i: int, dout: str) -> str:
        """Return the slot of the gradient by the pre-activations of layer i; `dout` is the gradient by its output."""
        if i not in self.unpooled:
            return dout
        return self.spread(i, dout, f"u{i}", self.spec.layers[i].activation)

    def spread(self, i: int, dout: str, name: str, activation: Activation = Activation.LINEAR) -> str:
        """Write the gradient through the pooling of layer i, and through the activation before it, to slot `name`."""
        x, saved = self.unpooled[i]
        out = self.low.rows(name, self.low.shapes[x][2])
        self.low.op(
            OpCode.MAXPOOL_DGRAD,
            LEARN,
            {"dout": dout, "x": x, "saved": saved, "out": out},
            activation=activation,
            **self._pooling(i),
        )
        return out

    def pick(self, i: int, y: str, name: str) -> str:
        """Write the adjoint of `spread` to slot `name`: `y` at the pixels that the pooling of layer i selected."""
        out = self.low.rows(name, self.spec.layers[i].n_out)
        slots = {"y": y, "x": self.unpooled[i][0], "out": out}
        self.low.op(OpCode.MAXPOOL_PICK, LEARN, slots, **self._pooling(i))
        return out

    def linear(self, i: int, x: str, out: str) -> None:
        """Write the convolution of layer i, without bias and activation."""
        slots = {"x": x, "W": self.weights[i], "out": out}
        self.low.op(OpCode.CONVOLVE, LEARN, slots, activation=Activation.LINEAR, **self._geometry(i))

    def wgrad(self, i: int, x: str, dz: str, *, bias: bool) -> None:
        """Add to the partial sums of the gradient by the weight of layer i, and write those by its bias if `bias`."""
        begun = i in self.partials
        if not begun:
            rows, filters = self.spec.layers[i].weight_shape
            size = (rows + 1) * padded(filters)
            self.partials[i] = self.low.slot(f"partial{i}", Region.SCRATCH, self.low.grains(size), size)
        slots = {"x": x, "dz": dz, "partial": self.partials[i]}
        self.low.op(OpCode.CONV_WGRAD, LEARN, slots, bias=bias, accumulate=begun, **self._geometry(i))

    def wgrads(self, inputs: list[str], deltas: Mapping[int, str]) -> None:
        """Write the partial sums of all gradients by weights and biases; no thread waits between them."""
        for i, layer in enumerate(self.spec.layers):
            if layer.convolution is not None:
                self.wgrad(i, inputs[i], deltas[i], bias=True)

    def gradient(self, i: int, modes: Mode) -> None:
        """Write the gradients by the weight and the bias of layer i from their partial sums."""
        for name, column in self._columns(i).items():
            slots = {"partial": self.partials[i], "out": f"d{name}"}
            self.low.op(OpCode.GRAIN_SUM, modes, slots, column=column, form=2)

    def update(self, i: int, penalty: str | None, decay: Mapping[str, float], rule: Mapping[str, float]) -> None:
        """Write the updates of the weight of layer i, with its decays, and of its bias."""
        for name, column in self._columns(i).items():
            weight = name == self.weights[i]
            state = {f"moment{k + 1}": f"moment{k + 1}.{name}" for k in range(self.spec.training.update.n_moments)}
            self.low.op(
                OpCode.GRAIN_UPDATE,
                Mode.TRAIN,
                {"partial": self.partials[i], "W": name, "penalty": penalty if weight else None, **state},
                column=column,
                **rule,
                **(decay if weight else dict.fromkeys(decay, 0.0)),
            )

    def _columns(self, i: int) -> dict[str, int]:
        """First columns, in the partial sums, of the weight's and of the bias's gradient."""
        rows, filters = self.spec.layers[i].weight_shape
        return {self.weights[i]: 0, f"b{i}": rows * padded(filters)}

    def _inside(self, i: int) -> bool:
        """Whether layers i - 1 and i are both convolutions: images between them have one channel after the other."""
        layers = self.spec.layers
        border = i in (0, self.spec.latent, len(layers))
        return not border and layers[i - 1].convolution is not None and layers[i].convolution is not None

    def _geometry(self, i: int) -> dict[str, int]:
        conv = self.spec.layers[i].convolution
        assert conv is not None
        # For an image of one channel, both layouts are the same.
        layout = X_LAST * (conv.shape[2] > 1 and not self._inside(i))
        layout |= OUT_LAST * (conv.filters > 1 and not conv.pooled and not self._inside(i + 1))
        values = (
            *conv.shape, *conv.size, conv.filters, *conv.kernel, *conv.strides, *conv.padding, *conv.upsample,
            conv.transposed, layout,
        )  # fmt: skip
        return dict(zip(GEOMETRY, values, strict=True))

    def _pooling(self, i: int) -> dict[str, int]:
        conv = self.spec.layers[i].convolution
        assert conv is not None
        layout = OUT_LAST * (conv.filters > 1 and not self._inside(i + 1))
        return dict(zip(POOLING, (*conv.image, *conv.pool, layout), strict=True))
