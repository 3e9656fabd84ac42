"""Training steps on counts of cells beside PyTorch, as wide as genes are many.

Usage: ``python bench/counts.py [--device cuda] [--threads 2] [--rounds 9] [--out FILE] [--lock FILE]`` in an
environment that holds narrows and PyTorch. A step is Adam on 512 or 2048 cells of 20000 genes, 7 % not zero, of a
network 20000-128-32-128-20000 with ReLU and a negative binomial decoder, zero-inflated or not, in the form of scVI:
the cell's sum times a softmax, an inverse dispersion for each gene; or with squared error on the normalised
logarithms (whose time beside more libraries is in `peers.py`; here it is for the memory). narrows reads CSR of raw
counts, or of their logarithms; PyTorch is given dense rows of both, made beforehand. Both begin with the same
numbers, and losses that differ end the run. The libraries take turns, each in a process of its own, and their memory
is what a step adds to the process that holds library and data; with ``--device cuda`` it is that of the GPU.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from bench.libraries.memory import status
from bench.pages import benchmarks as page
from bench.support.harness import (
    RESULTS,
    Repeated,
    Worker,
    about,
    compared,
    device,
    interleaved,
    lock,
    script,
    spread,
    store,
)

WIDTHS = (20000, 128, 32, 128, 20000)
BATCHES = 2
RATE, EPSILON = 1e-3, 1e-8


class Case(NamedTuple):
    """A likelihood, the cells of a step, and the least ratios to narrows that are wanted."""

    loss: str
    batch: int
    targets: dict[str, float]


_TARGETS = {"torch": 13.0, "torch.compile": 6.0}
CASES = {
    "genomics-mse": Case("mse", 512, {}),
    "genomics-nb": Case("nb", 512, _TARGETS),
    "genomics-zinb": Case("zinb", 512, _TARGETS),
    "genomics-nb-2048": Case("nb", 2048, {"torch": 16.0}),
}
BACKEND = {"cpu": "cpp", "cuda": "cuda"}
MEMORY_TARGET = 5.0
TOLERANCE = 1e-3
OUTS = {"cpu": RESULTS / "counts.json", "cuda": RESULTS / "counts-cuda.json"}


def counts(batch: int) -> Any:
    """CSR of BATCHES batches; rates of genes and cells are gamma distributed."""
    import scipy.sparse as sp

    rng = np.random.default_rng(0)
    genes = rng.gamma(0.3, 1.0, WIDTHS[0])
    genes *= 0.094 / genes.mean()
    # Row by row: the memory of a process is measured, too.
    cells = (rng.poisson(genes * rng.gamma(2.0, 0.5, WIDTHS[0])) for _ in range(batch * BATCHES))
    return sp.csr_array(sp.vstack([sp.csr_array(cell.astype(np.float32)[None]) for cell in cells], format="csr"))


def network(loss: str, X: Any) -> Any:
    """The specification and first parameters."""
    from narrows.fitting.start import initial_state
    from narrows.plan.spec import Activation, LayerSpec, Loss, NetworkSpec

    kind = Loss[loss.upper()]
    activations = [Activation.RELU] * 3 + [Activation.SOFTMAX if kind.info.of_counts else Activation.LINEAR]
    layers = [LayerSpec(*pair, a) for pair, a in zip(itertools.pairwise(WIDTHS), activations, strict=True)]
    if kind is Loss.ZINB:
        layers[-1] = LayerSpec(WIDTHS[-2], 2 * WIDTHS[-1], Activation.SOFTMAX)
    form: dict[str, Any] = {"gram_decoder": True}
    if kind.info.of_counts:
        form = {"log_normalize": True, "library": float(np.median(X.sum(axis=1)))}
    spec = NetworkSpec(tuple(layers), 2, loss=kind, sparse_input=True, epsilon=EPSILON, **form)
    return spec, initial_state(spec, 0, np.float32)


def narrows_steps(case: Case, threads: int) -> Callable[[int], float]:
    from narrows.backends import Hyper, compile_plan
    from narrows.plan.lowering import lower

    X = counts(case.batch)
    if case.loss == "mse":
        sums = X.sum(axis=1)
        X.data = np.log1p(X.data * np.repeat((np.median(sums) / sums).astype(np.float32), np.diff(X.indptr)))
    spec, state = network(case.loss, X)
    program = compile_plan(lower(spec, case.batch), BACKEND[device()], n_threads=threads)
    program.load(state)
    program.bind(X)
    rows, done = np.arange(len(X.indptr) - 1).reshape(BATCHES, case.batch), 0

    def run(steps: int) -> float:
        nonlocal done
        # In one call, as of a fit: PyTorch's steps do not wait for one another either.
        batches = rows[np.arange(done, done + steps) % BATCHES].reshape(-1)
        terms = program.train(batches, Hyper(0, done, np.full(steps, RATE)))
        done += steps
        return float(terms[-1, 0])

    return run


def torch_steps(case: Case, compiled: bool, threads: int) -> Callable[[int], float]:
    import torch
    from torch import nn
    from torch.nn.functional import softplus

    from narrows.plan.ops import DISPERSION_PACE

    torch.set_num_threads(threads)
    loss, batch = case.loss, case.batch
    X = counts(batch)
    _, state = network(loss, X)
    dense = torch.from_numpy(X.toarray()).to(device())
    library = dense.sum(dim=1, keepdim=True)
    inputs = torch.log1p(dense * (library.median() / library))
    if loss == "mse":
        dense = inputs
    layers = [nn.Linear(*pair) for pair in itertools.pairwise(WIDTHS)]
    if loss == "zinb":
        layers[-1] = nn.Linear(WIDTHS[-2], 2 * WIDTHS[-1])
    for i, layer in enumerate(layers):
        layer.weight.data = torch.from_numpy(np.ascontiguousarray(state[f"W{i}"].T))
        layer.bias.data = torch.from_numpy(state[f"b{i}"][0].copy())
        layer.to(device())
    model = nn.ParameterList([p for layer in layers for p in layer.parameters()])
    if "log_dispersion" in state:
        log_theta = nn.Parameter(torch.from_numpy(state["log_dispersion"][0].copy()).to(device()))
        model.append(log_theta)
    adam = torch.optim.Adam(model.parameters(), lr=RATE, eps=EPSILON, fused=True)
    n = WIDTHS[-1]

    def objective(x: Any, y: Any, size: Any) -> Any:
        for layer in layers[:-1]:
            x = torch.relu(layer(x))
        out = layers[-1](x)
        if loss == "mse":
            return nn.functional.mse_loss(out, y, reduction="sum") / len(y)
        mu = size * torch.softmax(out[:, :n], dim=1)
        theta = torch.exp(DISPERSION_PACE * log_theta)
        log_sum = torch.log(theta + mu + 1e-8)
        log_p = (
            theta * (torch.log(theta + 1e-8) - log_sum)
            + y * (torch.log(mu + 1e-8) - log_sum)
            + torch.lgamma(y + theta)
            - torch.lgamma(theta)
            - torch.lgamma(y + 1)
        )
        if loss == "zinb":
            zeta = out[:, n:]
            log_p = torch.where(y < 0.5, softplus(log_p - zeta) - softplus(-zeta), log_p - zeta - softplus(-zeta))
        return -log_p.sum(dim=1).mean()

    mode = "reduce-overhead" if device() == "cuda" else "default"
    evaluate = torch.compile(objective, mode=mode) if compiled else objective
    done = 0

    def run(steps: int) -> float:
        nonlocal done
        for _ in range(steps):
            at = slice(done % BATCHES * batch, (done % BATCHES + 1) * batch)
            adam.zero_grad()
            value = evaluate(inputs[at], dense[at], library[at])
            value.backward()
            adam.step()
            done += 1
        return float(value.detach())

    return run


def gpu_memory(library: str) -> float:
    """MiB of the GPU's memory that the library has taken at most."""
    if library == "narrows":
        import cupy

        return float(cupy.get_default_memory_pool().total_bytes()) / 2**20
    import torch

    return float(torch.cuda.max_memory_reserved()) / 2**20


class Contender:
    """What a worker runs."""

    def start(self, case: str, library: str, threads: int) -> dict[str, Any]:
        # In every process: what the libraries take by themselves is of no interest.
        import torch  # noqa: F401

        import narrows.fitting.start  # noqa: F401

        on_gpu = device() == "cuda"
        chosen, before = CASES[case], 0 if on_gpu else status("VmRSS")
        steps = (
            narrows_steps(chosen, threads)
            if library == "narrows"
            else torch_steps(chosen, library.endswith("compile"), threads)
        )
        held = gpu_memory(library) if on_gpu else status("VmRSS")
        losses = [steps(1) for _ in range(4)]
        peak = gpu_memory(library) if on_gpu else status("VmHWM")
        self.steps = Repeated({library: steps})
        return {"losses": losses, "before": before, "held": held, "peak": peak}

    def turn(self) -> float:
        return 1e3 * self.steps.turn()


def measure(case: str, threads: int, rounds: int) -> dict[str, Any]:
    """Milliseconds and memory of each library, narrows first."""
    workers = [Worker("counts", name) for name in ("narrows", "torch", "torch.compile")]
    try:
        found = {w.name: w.ask("start", case=case, library=w.name, threads=threads) for w in workers}
        for name, answer in found.items():
            for a, b in zip(answer["losses"], found["narrows"]["losses"], strict=True):
                if abs(a - b) > TOLERANCE * abs(b):
                    raise RuntimeError(f"{case}: {name} learns something else than narrows: {a} and {b}")
        ms: dict[str, list[float]] = {w.name: [] for w in workers}
        for worker in interleaved(workers, rounds):
            ms[worker.name].append(worker.ask("turn"))
    finally:
        for worker in workers:
            worker.__exit__()
    result = {}
    for name, values in ms.items():
        answer = found[name]
        result[name] = spread(values) | {
            "ratio": statistics.median(v / b for v, b in zip(values, ms["narrows"], strict=True)),
            "peak_mib": answer["peak"] - answer["before"],
            "step_mib": answer["peak"] - answer["held"],
        }
    return result


def main() -> None:
    options = compared(__doc__, OUTS, " during each case", rounds=9)
    from narrows.backends import probe, resolve

    report = about(options, "torch") | {
        "backend": probe(resolve(BACKEND[options.device])).reason,
        "targets": {"ratio": {name: case.targets for name, case in CASES.items()}, "memory": MEMORY_TARGET},
        "ms": {},
    }
    for case in CASES:
        with lock(options.lock):
            report["ms"][case] = measure(case, options.threads, options.rounds)
        for name, figures in report["ms"][case].items():
            print(
                f"{case}  {name:14s} {figures['median']:8.2f} ms  ratio {figures['ratio']:.2f}  "
                f"{figures['peak_mib']:.0f} MiB with the data, {figures['step_mib']:.0f} MiB of steps",
                flush=True,
            )
    store(report, options.out)
    if options.out in OUTS.values():
        page.write()


if __name__ == "__main__":
    script(main, Contender)
