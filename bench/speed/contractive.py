"""The contractive penalty beside PyTorch: its value and gradient, and its cost in a training step.

Usage: ``python bench/speed/contractive.py [--cases cae-deep,...] [--threads 2] [--rounds 9] [--results DIR]
[--lock FILE]``. PyTorch is left out if it is not installed.

The penalty is the mean over 256 rows of the squared Frobenius norm of d latent / d input, for sigmoid layers; the
gradients are by all weights and biases. Results that differ end the run. PyTorch computes the penalty by
``vmap(jacrev)``, by a loop over the latents, and for one layer by the closed form, with autograd for the gradient. The
libraries take turns, each in its own process.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
from numpy.typing import NDArray

from bench.support.harness import Repeated, Worker, in_turns, installed, repeated
from bench.support.results import header
from bench.support.scripts import chosen, comparing, finish, lock, parsed, script

ROWS = 256
CASES = {"cae-deep": (784, 256, 32), "cae-single": (784, 256)}
TARGETS = {"cae-deep": 10.0, "cae-step": 1.05}
"""Least ratio of vmap(jacrev) to narrows; greatest ratio of a training step with the penalty to one without."""
TOLERANCE = 1e-4

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
    """Training steps of 784-256-784 with sigmoid layers and Adam."""
    from narrows.backends import Hyper, compile_plan
    from narrows.plan.lowering import lower
    from narrows.plan.spec import Activation, LayerSpec, Loss, NetworkSpec, Penalties, Training

    X, W, _ = operands((784, 256, 784))
    layers = tuple(LayerSpec(w.shape[0], w.shape[1], Activation.SIGMOID) for w in W)
    training = Training(penalties=Penalties(contractive=contractive))
    program = compile_plan(
        lower(NetworkSpec(layers, 1, loss=Loss.BCE, training=training), ROWS), "cpp", n_threads=threads
    )
    program.load({f"W{i}": w for i, w in enumerate(W)} | {f"b{i}": np.zeros(w.shape[1]) for i, w in enumerate(W)})
    program.bind(X)
    return lambda n: program.train(np.tile(np.arange(ROWS), n), Hyper(0, 0, np.full(n, 1e-6)))


class Contender:
    """One way, in its own process (see `harness`)."""

    def start(self, case: str, library: str, way: str, threads: int) -> list[float]:
        """Prepare; the value and the norm of each gradient, if the way has any."""
        if library == "step":
            self.repeated = Repeated({way: step_way(float(way), threads)})
            return []
        run = narrows_way(case, threads) if library == "narrows" else torch_way(case, way)
        value, grads = run()
        self.repeated = Repeated({way: repeated(run)})
        return [value, *(float(np.linalg.norm(np.asarray(g))) for g in grads)]

    def turn(self) -> float:
        return self.repeated.turn() * 1e3


def measure(case: str, ways: list[tuple[str, str]], threads: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of each way, and their ratios to the first."""
    with ExitStack() as stack:
        names = [f"{library} {way}".strip() for library, way in ways]
        workers = [stack.enter_context(Worker("speed.contractive", name)) for name in names]
        found = [
            worker.ask("start", case=case, library=library, way=way, threads=threads)
            for worker, (library, way) in zip(workers, ways, strict=True)
        ]
        for name, answer in zip(names, found, strict=True):
            for a, b in zip(answer, found[0], strict=True):
                if abs(a - b) > TOLERANCE * abs(b) + 1e-7:
                    raise RuntimeError(f"{case}: {name} and {names[0]} have different results: {a} and {b}")
        return in_turns(workers, rounds)


WAYS = {
    "cae-deep": [("narrows", ""), ("torch", "vmap(jacrev)"), ("torch", "loop")],
    "cae-single": [("narrows", ""), ("torch", "closed form"), ("torch", "vmap(jacrev)")],
    "cae-step": [("step", "0.0"), ("step", "0.1")],
}
"""Libraries and their ways in each case; ratios are to the first, in `cae-step` to the step without the penalty."""


def main() -> None:
    options_parser = comparing(__doc__, locked="during each case", rounds=9, known=tuple(WAYS))
    options = parsed(options_parser)
    torch = ["torch"] if installed(["torch"]) else []
    report = header(torch, threads=options.threads, rounds=options.rounds, targets=TARGETS, ms={})
    for case in chosen(options_parser, "--cases", options.cases, tuple(WAYS)):
        ways = [way for way in WAYS[case] if torch or way[0] != "torch"]
        with lock(options.lock):
            report["ms"][case] = measure(case, ways, options.threads, options.rounds)
        for name, figures in report["ms"][case].items():
            print(f"{case}  {name:20s} {figures['median']:8.3f} ms  ratio {figures['ratio']:.3f}", flush=True)
    finish(report, "contractive", options)


if __name__ == "__main__":
    script(main, Contender)
