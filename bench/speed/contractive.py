"""The contractive penalty beside PyTorch: value and gradient, and what a training step pays for it.

Usage: ``python bench/speed/contractive.py [--threads 2] [--rounds 9] [--out FILE] [--lock FILE]`` in an environment
that
holds narrows and PyTorch. The penalty is the mean over a batch of 256 rows of the squared Frobenius norm of d latent /
d input, of sigmoid layers, with its gradients by all weights and biases; results that differ end the run. PyTorch
computes it by ``vmap(jacrev)``, by a loop over the latents, and where there is one layer by the closed form written
out, all with autograd for the gradient. The libraries take turns, each in a process of its own.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
from numpy.typing import NDArray

from bench.support.harness import RESULTS, Repeated, Worker, about, compared, interleaved, lock, script, spread, store

ROWS = 256
CASES = {"cae-deep": (784, 256, 32), "cae-single": (784, 256)}
TARGETS = {"cae-deep": 10.0, "cae-step": 1.05}
"""Least ratio of PyTorch's vmap(jacrev) to narrows; greatest of a training step with the penalty to one without."""
TOLERANCE = 1e-4
OUT = RESULTS / "contractive.json"

FloatArray = NDArray[np.float32]
Run = Callable[[], tuple[float, list[Any]]]


def operands(widths: tuple[int, ...]) -> tuple[FloatArray, list[FloatArray], list[FloatArray]]:
    """X, weights and biases."""
    rng = np.random.default_rng(0)
    X = rng.random((ROWS, widths[0]), dtype=np.float32)
    W = [rng.standard_normal(s, dtype=np.float32) / np.float32(np.sqrt(s[0])) for s in itertools.pairwise(widths)]
    return X, W, [np.zeros(n, np.float32) for n in widths[1:]]


def narrows_way(case: str, threads: int) -> Run:
    from narrows import functional

    X, W, b = operands(CASES[case])

    def run() -> tuple[float, list[Any]]:
        value, dW, db = functional.contractive_penalty(X, W, b, "sigmoid", n_threads=threads)
        return value, [*dW, *db]

    return run


def torch_way(case: str, way: str) -> Run:
    import torch

    X, W, b = operands(CASES[case])
    x = torch.from_numpy(X)
    weights, biases = ([torch.from_numpy(a).requires_grad_() for a in arrays] for arrays in (W, b))

    def encode(rows: Any) -> Any:
        for w, v in zip(weights, biases, strict=True):
            rows = torch.sigmoid(rows @ w + v)
        return rows

    def by_jacrev() -> Any:
        return torch.func.vmap(torch.func.jacrev(encode))(x).square().sum() / ROWS

    def by_loop() -> Any:
        rows = x.clone().requires_grad_()
        code = encode(rows)
        total = 0
        for k in range(code.shape[1]):
            total = total + torch.autograd.grad(code[:, k].sum(), rows, create_graph=True)[0].square().sum()
        return total / ROWS

    def by_formula() -> Any:
        code = encode(x)
        slope = code * (1 - code)
        return (slope.square().sum(0) @ weights[0].square().sum(0)) / ROWS

    penalty = {"vmap(jacrev)": by_jacrev, "loop": by_loop, "closed form": by_formula}[way]

    def run() -> tuple[float, list[Any]]:
        value = penalty()
        return value.item(), list(torch.autograd.grad(value, [*weights, *biases]))

    return run


def step_way(contractive: float, threads: int) -> Callable[[int], object]:
    """Training steps of 784-256-784, sigmoid, Adam."""
    from narrows.backends import Hyper, compile_plan
    from narrows.plan.lowering import lower
    from narrows.plan.spec import Activation, LayerSpec, Loss, NetworkSpec

    X, W, _ = operands((784, 256, 784))
    layers = tuple(LayerSpec(*w.shape, Activation.SIGMOID) for w in W)
    program = compile_plan(
        lower(NetworkSpec(layers, 1, loss=Loss.BCE, contractive=contractive), ROWS), "cpp", n_threads=threads
    )
    program.load({f"W{i}": w for i, w in enumerate(W)} | {f"b{i}": np.zeros(w.shape[1]) for i, w in enumerate(W)})
    program.bind(X)
    return lambda n: program.train(np.tile(np.arange(ROWS), n), Hyper(0, 0, np.full(n, 1e-6)))


class Contender:
    """One way, in a process of its own (see `harness`)."""

    def start(self, case: str, library: str, way: str, threads: int) -> dict[str, Any]:
        """Prepare; the value and the norm of each gradient, where there are any."""
        if library == "step":
            self.repeated = Repeated({way: step_way(float(way), threads)})
            return {}
        run = narrows_way(case, threads) if library == "narrows" else torch_way(case, way)
        value, grads = run()

        def times(n: int) -> None:
            for _ in range(n):
                run()

        self.repeated = Repeated({way: times})
        return {"value": value, "norms": [float(np.linalg.norm(np.asarray(g))) for g in grads]}

    def turn(self) -> float:
        return self.repeated.turn() * 1e3


def measure(case: str, ways: list[tuple[str, str]], threads: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of each way, and their ratios to the first."""
    workers = [Worker("speed.contractive", f"{library} {way}".strip()) for library, way in ways]
    try:
        found = {
            w.name: w.ask("start", case=case, library=library, way=way, threads=threads)
            for w, (library, way) in zip(workers, ways, strict=True)
        }
        first = found[workers[0].name]
        for name, answer in found.items():
            for a, b in zip(
                [answer.get("value", 0), *answer.get("norms", [])],
                [first.get("value", 0), *first.get("norms", [])],
                strict=True,
            ):
                if abs(a - b) > TOLERANCE * abs(b) + 1e-7:
                    raise RuntimeError(f"{case}: {name} computes something else than {workers[0].name}: {a} and {b}")
        ms: dict[str, list[float]] = {w.name: [] for w in workers}
        for worker in interleaved(workers, rounds):
            ms[worker.name].append(worker.ask("turn"))
    finally:
        for worker in workers:
            worker.__exit__()
    base = ms[workers[0].name]
    return {
        name: spread(values) | {"ratio": statistics.median(v / b for v, b in zip(values, base, strict=True))}
        for name, values in ms.items()
    }


def main() -> None:
    options = compared(__doc__, OUT, " during each case", rounds=9)
    ways = {
        "cae-deep": [("narrows", ""), ("torch", "vmap(jacrev)"), ("torch", "loop")],
        "cae-single": [("narrows", ""), ("torch", "closed form"), ("torch", "vmap(jacrev)")],
        # Ratios are to the step without the penalty.
        "cae-step": [("step", "0.0"), ("step", "0.1")],
    }
    report = about(options, "torch") | {
        "targets": TARGETS,
        "ms": {},
    }
    for case, contenders in ways.items():
        with lock(options.lock):
            report["ms"][case] = measure(case, contenders, options.threads, options.rounds)
        for name, figures in report["ms"][case].items():
            print(f"{case}  {name:20s} {figures['median']:8.3f} ms  ratio {figures['ratio']:.3f}", flush=True)
    store(report, options.out)


if __name__ == "__main__":
    script(main, Contender)
