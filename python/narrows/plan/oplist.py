"""The op list of a plan while it is being written.

Promises: operands fit the signature of their op; slots that are not in use at the same time share memory.
Never: knows a network (`lowering` does).
"""

from __future__ import annotations

from collections.abc import Mapping

from .ops import SIGNATURES, OpCode, Source, padded
from .plan import LEARN, Mode, Op, Region, Slot
from .spec import Activation, LayerSpec, Noise

__all__ = ["OpList"]


MAX_GRAINS = 16
"""Grains of rows with their own partial sums; so many threads can share the rows."""
MIN_ROWS = 8
"""Rows that are worth a grain."""
PARTIAL_SIZE = 1 << 23
"""Elements that the partial sums may take if there are more than two grains."""


class OpList:
    """The op list while it is being written. Slots have names; `assign` gives them offsets at the end."""

    def __init__(self, batch_rows: int) -> None:
        self.batch_rows = batch_rows
        self.shapes: dict[str, tuple[Region, int, int]] = {}
        self.ops: list[Op] = []
        self.names: list[str] = []
        self.terms: list[str] = []
        self.n_streams = 0
        self.corruption_stream = 0

    def slot(self, name: str, region: Region, rows: int, cols: int) -> str:
        self.shapes[name] = (region, rows, cols)
        self.names.append(name)
        return name

    def rows(self, name: str, cols: int) -> str:
        """A slot with one row per sample."""
        return self.slot(name, Region.BATCH, self.batch_rows, cols)

    def op(self, code: OpCode, modes: Mode, slots: Mapping[str, str | None], **attributes: float) -> None:
        signature = SIGNATURES[code]
        unknown = (set(slots) - set(signature.slots)) | (set(attributes) ^ {*signature.ints, *signature.floats})
        if unknown:
            raise TypeError(f"{code.name}: operands {sorted(unknown)} do not fit its signature")
        indices = tuple(-1 if (name := slots.get(role)) is None else self.names.index(name) for role in signature.slots)
        self.ops.append(
            Op(
                code,
                modes,
                indices,
                tuple(int(attributes[n]) for n in signature.ints),
                tuple(float(attributes[n]) for n in signature.floats),
            )
        )

    def stream(self) -> int:
        """A new random stream for the op being written."""
        self.n_streams += 1
        return self.n_streams - 1

    def corrupt(self, x: str, noise: Noise, stream: int) -> None:
        bounds = {"low": noise.low, "high": noise.high}
        self.op(OpCode.CORRUPT, LEARN, {"x": x}, kind=noise.kind, stream=stream, level=noise.level, **bounds)

    def dense(
        self,
        name: str,
        modes: Mode,
        layer: LayerSpec,
        operands: Mapping[str, str],
        *,
        output: bool = False,
        transposed: bool = False,
        masking: Mapping[str, float] | None = None,
    ) -> tuple[str, str]:
        """Write a layer whose slot names end in `name`.

        The output layer stops at the pre-activation, because the loss applies its activation. `masking` (attributes of
        the masking noise and the scale of counts) makes the layer read sparse rows of X.

        Returns
        -------
        out, saved : str
            Slot of the output, and slot that the derivative is computed from.
        """
        activation = Activation.LINEAR if output else layer.activation
        out = self.rows(f"a{name}", layer.n_out)
        pre = self.rows(f"z{name}", layer.n_out) if activation.needs_preactivation else None
        slots = {**operands, "out": out, "pre": pre}
        if masking is None:
            self.op(OpCode.DENSE, modes, slots, activation=activation, transposed=transposed)
        else:
            self.op(OpCode.SPARSE_DENSE, modes, slots, activation=activation, **masking)
        return out, pre or out

    def dgrad(self, before: LayerSpec, dz: str, W: str, saved: str, out: str, *, transposed: bool = False) -> None:
        """Write the gradient by the pre-activations of the layer `before`, or by its output if that is pooled.

        `dz` is the gradient by the pre-activations of the next layer, which has the weight `W`.
        """
        self.op(
            OpCode.DGRAD,
            LEARN,
            {"dz": dz, "W": W, "saved": saved, "out": out},
            activation=before.derivative_activation,
            transposed=transposed,
            scale=before.saved_scale,
        )

    def gram_loss(
        self, modes: Mode, operands: dict[str, str | None], before: LayerSpec, rowloss: str, out: str, *, source: Source
    ) -> None:
        """Write the squared error of a layer against CSR rows, and the gradient as `dgrad` does."""
        _, inner, _ = self.shapes[str(operands["W"])]
        gram = {part: self.slot(f"gram.{part}", Region.SCRATCH, inner + 1, inner + 1) for part in ("high", "low")}
        self.op(OpCode.WEIGHT_GRAM, modes, {"W": operands["W"], "b": operands["b"], **gram})
        self.op(
            OpCode.SPARSE_MSE,
            modes,
            {**operands, **gram, "rowloss": rowloss, "out": out},
            source=source,
            activation=before.derivative_activation,
            scale=before.saved_scale,
        )

    def grains(self, size: int) -> int:
        """The number of grains of a step, if each grain has partial sums of `size` elements."""
        wanted = min(MAX_GRAINS, max(1, self.batch_rows // MIN_ROWS))
        return min(wanted, max(2, PARTIAL_SIZE // padded(size)))

    def term(self, name: str) -> int:
        if name not in self.terms:
            self.terms.append(name)
        return self.terms.index(name)

    def assign(self, keep: set[str]) -> tuple[tuple[Slot, ...], int]:
        """Give every slot its offset; batch slots share memory if no op needs both.

        Slots in `keep` (results of a mode) keep their memory to the end of the list.
        """
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for position, op in enumerate(self.ops):
            for i in op.slots:
                first.setdefault(i, position)
                last[i] = position
        slots: list[Slot] = []
        size = dict.fromkeys(Region, 0)
        placed: list[tuple[int, int, int, int]] = []  # offset, end, first op, last op
        for i, name in enumerate(self.names):
            region, rows, cols = self.shapes[name]
            extent = rows * padded(cols)
            if region < Region.BATCH:
                offset = size[region]
                size[region] += extent
            else:
                shared = region is Region.BATCH
                begin = first.get(i, 0) if shared else 0
                end = last.get(i, 0) if shared and name not in keep else len(self.ops)
                offset = 0
                for o, e, f, to in sorted(placed):
                    if f <= end and begin <= to and offset < e and o < offset + extent:
                        offset = e
                placed.append((offset, offset + extent, begin, end))
            slots.append(Slot(name, region, rows, cols, offset))
        return tuple(slots), max((p[1] for p in placed), default=0)
