"""Dense layers with parameters, for libraries that write their own training loop.

- Forward and backward are `functional.dense` and `functional.dense_backward`.
- Parameters and gradients are plain NumPy or CuPy arrays. Only the caller updates them, in place if it likes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import functional
from ._extras import require
from .functional.operands import elementwise
from .plan.spec import ACTIVATIONS
from .random.weights import draw_seed, initial_weight

__all__ = ["Dense", "Sequential"]


class Dense:
    """A dense layer ``activation(X @ W + b)`` that holds its parameters.

    Parameters
    ----------
    in_features, out_features : int
    activation : str
        An elementwise activation.
    random_state : int, RandomState, Generator or None
        Seed of the first weights: He uniform before rectifiers, Glorot uniform otherwise. Biases start at zero.
    dtype : dtype
        float32 or float64.
    device : {"cpu", "cuda"}
        Where the layer computes: with NumPy arrays, or with CuPy arrays on CuPy's current GPU.

    Attributes
    ----------
    params : dict
        ``"W"`` (in_features, out_features) and ``"b"`` (out_features,).
    grads : dict
        The same names; :meth:`backward` fills it.

    Examples
    --------
    >>> import numpy as np
    >>> from narrows.layers import Dense
    >>> layer = Dense(4, 2, "relu", random_state=0)
    >>> layer.forward(np.ones((3, 4), np.float32)).shape
    (3, 2)
    >>> layer.backward(np.ones((3, 2), np.float32)).shape
    (3, 4)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: str = "linear",
        *,
        random_state: Any = None,
        dtype: Any = np.float32,
        device: str = "cpu",
    ) -> None:
        if device not in ("cpu", "cuda"):
            raise ValueError(f"device={device!r} must be 'cpu' or 'cuda'")
        act = elementwise(activation)
        if np.dtype(dtype) not in (np.float32, np.float64):
            raise ValueError(f"dtype={dtype!r} must be float32 or float64")
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            if int(value) != value or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer")
        self.in_features = int(in_features)
        self.out_features = int(out_features)
        self.activation = activation
        weight = initial_weight(self.in_features, self.out_features, act, draw_seed(random_state))
        self.params: dict[str, NDArray[Any]] = {
            "W": weight.astype(dtype),
            "b": np.zeros(self.out_features, dtype),
        }
        if device == "cuda":
            cupy = require("cupy", "cuda12", "a layer on a GPU")
            self.params = {name: cupy.asarray(array) for name, array in self.params.items()}
        self.grads: dict[str, Any] = {}
        self._saved: tuple[Any, Any, Any] | None = None

    def forward(self, X: Any) -> Any:
        """The layer's output. The layer keeps what :meth:`backward` needs.

        Parameters
        ----------
        X : array-like or CSR, shape (n, in_features)
            As for `functional.dense`.

        Returns
        -------
        array, shape (n, out_features)
            float64 if X or the weights are, else float32; an array of X's library.
        """
        Z = None
        if isinstance(X, list | tuple):
            X = np.asarray(X)
        if ACTIVATIONS[self.activation].needs_preactivation:
            shape = X.shape[0], self.out_features
            Z = np.empty_like(self.params["W"], self._dtype(X), order="C", shape=shape)
        A = functional.dense(X, self.params["W"], self.params["b"], self.activation, Z=Z)
        self._saved = (X, A, Z)
        return A

    def backward(self, dA: Any) -> Any:
        """Fill `grads` and return the gradient by X of the last :meth:`forward`.

        Parameters
        ----------
        dA : array-like, shape (n, out_features)
            Gradient of the loss by the output.

        Returns
        -------
        array, shape (n, in_features)

        Raises
        ------
        RuntimeError
            :meth:`forward` was not called before.
        """
        if self._saved is None:
            raise RuntimeError("call forward() before backward()")
        X, A, Z = self._saved
        dX, dW, db = functional.dense_backward(dA, X, self.params["W"], A, self.activation, Z=Z)
        self.grads = {"W": dW, "b": db}
        return dX

    def _dtype(self, X: Any) -> Any:
        return np.float64 if str(X.dtype).endswith("float64") else self.params["W"].dtype

    def __repr__(self) -> str:
        return f"Dense({self.in_features}, {self.out_features}, {self.activation!r})"


class Sequential:
    """A chain of layers.

    Parameters
    ----------
    layers : sequence of Dense or Sequential

    Examples
    --------
    >>> import numpy as np
    >>> from narrows.layers import Dense, Sequential
    >>> net = Sequential([Dense(4, 3, "relu", random_state=0), Dense(3, 2, "linear", random_state=1)])
    >>> net.forward(np.ones((5, 4), np.float32)).shape
    (5, 2)
    >>> net.backward(np.ones((5, 2), np.float32)).shape
    (5, 4)
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = list(layers)

    @property
    def params(self) -> list[dict[str, NDArray[Any]]]:
        """The layers' parameters, in order."""
        return [layer.params for layer in self.layers]

    @property
    def grads(self) -> list[dict[str, Any]]:
        """The layers' gradients, in order."""
        return [layer.grads for layer in self.layers]

    def forward(self, X: Any) -> Any:
        """The last layer's output, shape (n, out_features) of that layer; X as for :meth:`Dense.forward`."""
        for layer in self.layers:
            X = layer.forward(X)
        return X

    def backward(self, dA: Any) -> Any:
        """Fill the layers' `grads`, given the gradient by the last layer's output; return the gradient by X."""
        for layer in reversed(self.layers):
            dA = layer.backward(dA)
        return dA

    def __repr__(self) -> str:
        return f"Sequential([{', '.join(map(repr, self.layers))}])"
