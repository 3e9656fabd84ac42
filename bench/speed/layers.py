"""Single layers of `narrows.functional` beside PyTorch's operators, from 16 to 4096 wide.

Usage: ``python bench/speed/layers.py [--widths 16,256] [--threads 2] [--rounds 7] [--results DIR] [--lock FILE]`` in an
environment that holds narrows and PyTorch. docs/benchmarks.md shows the result.

Forward is ``activation(X @ W + b)``; backward is all three gradients from the same dA and output. The two libraries
take turns, each in its own process. If a library has several ways to the same result, the fastest one counts. Results
that differ end the run.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
from numpy.typing import NDArray

from bench.support.harness import Repeated, Worker, interleaved, repeated, spread
from bench.support.results import header
from bench.support.scripts import finish, lock, parsed, parser, script, with_threads

WIDTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
ROWS = 256
ACTIVATIONS = ("relu", "sigmoid")
SIGMOID_WIDTH = 1024
"""Greatest width at which sigmoid is timed: in wider layers the activation takes a negligible share."""
TOLERANCE = 5e-3
"""Of a projection, relative to the norm: rounding decides if a few outputs of relu, and their gradients, are zero."""

FloatArray = NDArray[np.float32]
Ways = dict[str, Callable[[], Any]]


def operands(shape: tuple[int, int, int]) -> tuple[Any, ...]:
    """X, W, b and dA."""
    rows, n_in, n_out = shape
    rng = np.random.default_rng(0)
    shapes = ((rows, n_in), (n_in, n_out), n_out, (rows, n_out))
    X, W, b, dA = (rng.standard_normal(s, dtype=np.float32) for s in shapes)
    return X, W / np.float32(np.sqrt(n_in)), b, dA


def narrows_ways(what: str, shape: tuple[int, int, int], activation: str) -> Ways:
    from narrows import functional

    X, W, b, dA = operands(shape)
    if what == "forward":
        out = np.empty_like(dA)
        return {
            "out=": lambda: (functional.dense(X, W, b, activation, out=out),),
            "a new array": lambda: (functional.dense(X, W, b, activation),),
        }
    A = functional.dense(X, W, b, activation)
    outs = (np.empty_like(X), np.empty_like(W), np.empty_like(b))
    return {
        "out=": lambda: functional.dense_backward(dA, X, W, A, activation, out=outs),
        "new arrays": lambda: functional.dense_backward(dA, X, W, A, activation),
    }


def torch_ways(what: str, shape: tuple[int, int, int], activation: str) -> Ways:
    import torch

    X, W, b, dA = (torch.from_numpy(a) for a in operands(shape))
    act = {"relu": torch.relu, "sigmoid": torch.sigmoid}[activation]
    act_ = {"relu": torch.relu_, "sigmoid": torch.sigmoid_}[activation]
    transposed = W.T.contiguous()
    linear = torch.nn.functional.linear
    if what == "forward":
        out = torch.empty_like(dA)
        return {
            "linear": lambda: (act_(linear(X, transposed, b)),),
            "addmm(out=)": lambda: (act_(torch.addmm(b, X, W, out=out)),),
        }
    A = act(linear(X, transposed, b))
    slope: Callable[[], Any] = {
        "relu": lambda: torch.ops.aten.threshold_backward(dA, A, 0),
        "sigmoid": lambda: torch.ops.aten.sigmoid_backward(dA, A),
    }[activation]
    dX, dW, db = torch.empty_like(X), torch.empty_like(W), torch.empty_like(b)

    def by_formula() -> tuple[Any, ...]:
        dZ = slope()
        return dZ @ W.T, X.T @ dZ, dZ.sum(0)

    def into_arrays() -> tuple[Any, ...]:
        dZ = slope()
        return torch.mm(dZ, W.T, out=dX), torch.mm(X.T, dZ, out=dW), torch.sum(dZ, 0, out=db)

    leaves = [a.clone().requires_grad_() for a in (X, transposed, b)]
    with torch.enable_grad():
        graph = act(linear(*leaves))

    def autograd() -> tuple[Any, ...]:
        gX, gW, gb = torch.autograd.grad(graph, leaves, dA, retain_graph=True)
        return gX, gW.T, gb

    return {"by formula": by_formula, "by formula, out=": into_arrays, "autograd": autograd}


LIBRARIES: Mapping[str, Callable[[str, tuple[int, int, int], str], Ways]] = {
    "narrows": narrows_ways,
    "pytorch": torch_ways,
}


def projected(array: FloatArray) -> tuple[float, float]:
    """A sum over the array with random weights, which tells two arrays apart, and the array's norm."""
    weights = np.random.default_rng(1).standard_normal(array.shape, dtype=np.float32)
    return float((array * weights).sum(dtype=np.float64)), float(np.linalg.norm(array))


class Layer:
    """One library at one layer, in its own process (see `harness`)."""

    def start(self, library: str, what: str, shape: list[int], activation: str) -> dict[str, Any]:
        """Prepare all ways; the result of each way, as a random projection and the norm of every array."""
        if library == "pytorch":
            import torch

            torch.set_grad_enabled(False)
        rows, n_in, n_out = shape
        ways = LIBRARIES[library](what, (rows, n_in, n_out), activation)
        results = {name: [projected(np.asarray(a)) for a in run()] for name, run in ways.items()}

        self.ways = Repeated({name: repeated(run) for name, run in ways.items()})
        return {"way": self.ways.name, "results": results}

    def turn(self) -> float:
        return self.ways.turn() * 1e3


def check(what: str, ready: dict[str, dict[str, Any]]) -> None:
    """Raise unless all ways of all libraries have the same results."""
    wanted = next(iter(ready["narrows"]["results"].values()))
    for library, answer in ready.items():
        for way, found in answer["results"].items():
            for (projection, _), (expected, norm) in zip(found, wanted, strict=True):
                if not abs(projection - expected) <= TOLERANCE * norm:
                    raise RuntimeError(f"{what}: {library} ({way}) and narrows have different results")


def measure(workers: list[Worker], what: str, shape: tuple[int, int, int], activation: str, rounds: int) -> Any:
    ready = {w.name: w.ask("start", library=w.name, what=what, shape=shape, activation=activation) for w in workers}
    check(f"{what} {activation} {shape}", ready)
    ms: dict[str, list[float]] = {worker.name: [] for worker in workers}
    for worker in interleaved(workers, rounds):
        ms[worker.name].append(worker.ask("turn"))
    ratio = spread([a / b for a, b in zip(ms["pytorch"], ms["narrows"], strict=True)])
    found = {name: spread(values) | {"way": ready[name]["way"]} for name, values in ms.items()}
    return {"what": what, "shape": shape, "activation": activation, "ms": found, "ratio": ratio}


def summary(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric mean and worst of the ratios."""
    result = {}
    for what in ("forward", "backward"):
        chosen = [layer for layer in layers if layer["what"] == what]
        worst = min(chosen, key=lambda layer: layer["ratio"]["median"])
        result[what] = {
            "geometric_mean": statistics.geometric_mean(layer["ratio"]["median"] for layer in chosen),
            "worst": worst["ratio"]["median"],
            "worst_at": [worst["activation"], worst["shape"]],
        }
    return result


def main() -> None:
    options_parser = with_threads(parser(__doc__, locked="during each shape"))
    options_parser.add_argument("--rounds", type=int, default=7)
    options_parser.add_argument("--widths", default=",".join(map(str, WIDTHS)))
    options = parsed(options_parser)
    widths = [int(n) for n in options.widths.split(",")]
    report = header(["torch"], threads=options.threads, rounds=options.rounds)
    layers: list[dict[str, Any]] = []
    with Worker("speed.layers", "narrows") as narrows, Worker("speed.layers", "pytorch") as pytorch:
        # Rows, inputs, outputs.
        for shape in dict.fromkeys([(n, n, n) for n in widths] + [(ROWS, n, n) for n in widths]):
            activations = ACTIVATIONS if shape[1] <= SIGMOID_WIDTH else ACTIVATIONS[:1]
            kinds = [(what, activation) for what in ("forward", "backward") for activation in activations]
            with lock(options.lock):
                here = [measure([narrows, pytorch], what, shape, act, options.rounds) for what, act in kinds]
            print(shape, *(f"{x['what']} {x['activation']} {x['ratio']['median']:.2f}x" for x in here), flush=True)
            layers += here
    report |= {"summary": summary(layers), "layers": layers}
    print(report["summary"])
    finish(report, "layers", options)


if __name__ == "__main__":
    script(main, Layer)
