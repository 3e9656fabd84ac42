"""Training steps on counts of cells beside PyTorch, with as many features as there are genes.

Usage: ``python bench/counts.py [--cases genomics-nb,...] [--device cuda] [--threads 2] [--rounds 9] [--results DIR]
[--lock FILE]``. PyTorch is left out if it is not installed. docs/benchmarks.md shows the result.

A step is Adam on 512 or 2048 cells of 20000 genes, 7 % of the counts not zero, 20000-128-32-128-20000 with ReLU.

- The decoder is negative binomial, optionally zero-inflated, in the form of scVI: the cell's sum times a softmax, and
  an inverse dispersion for each gene. `genomics-mse` has squared error on the normalised logarithms; here it is for the
  memory, `peers.py` compares its time with more libraries.
- narrows reads CSR: raw counts, or their logarithms. PyTorch reads dense rows of both that were made beforehand.
- Both libraries begin with the same numbers. Losses that differ end the run.
- The libraries take turns, each in its own process. Memory is what steps add to the process that holds library and
  data; with ``--device cuda`` it is the GPU's memory.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from bench.libraries.memory import status
from bench.support.harness import DEVICES, Repeated, Worker, device, in_turns, installed
from bench.support.results import header
from bench.support.scripts import chosen, comparing, finish, lock, parsed, script

WIDTHS = (20000, 128, 32, 128, 20000)
BATCHES = 2
RATE, EPSILON = 1e-3, 1e-8


class Case(NamedTuple):
    """A loss, the cells of a step, and the ratios to narrows that other libraries should at least have."""

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


def counts(batch: int) -> Any:
    """Counts of all batches as CSR; the rates of genes and cells have gamma distributions."""
    import scipy.sparse as sp

    rng = np.random.default_rng(0)
    genes = rng.gamma(0.3, 1.0, WIDTHS[0])
    genes *= 0.094 / genes.mean()
    # Row by row: the memory of the process is measured.
    cells = (rng.poisson(genes * rng.gamma(2.0, 0.5, WIDTHS[0])) for _ in range(batch * BATCHES))
    return sp.csr_array(sp.vstack([sp.csr_array(cell.astype(np.float32)[None]) for cell in cells], format="csr"))


def network(loss: str, X: Any) -> Any:
    """The specification and first parameters."""
    from narrows.fitting.start import initial_state
    from narrows.plan.spec import Activation, Data, Form, LayerSpec, Loss, NetworkSpec, Training, Update

    kind = Loss[loss.upper()]
    activations = [Activation.RELU] * 3 + [Activation.SOFTMAX if kind.info.of_counts else Activation.LINEAR]
    layers = [LayerSpec(*pair, a) for pair, a in zip(itertools.pairwise(WIDTHS), activations, strict=True)]
    if kind is Loss.ZINB:
        layers[-1] = LayerSpec(WIDTHS[-2], 2 * WIDTHS[-1], Activation.SOFTMAX)
    counted = kind.info.of_counts
    spec = NetworkSpec(
        tuple(layers),
        2,
        loss=kind,
        log_normalize=counted,
        training=Training(update=Update(epsilon=EPSILON)),
        data=Data(size_sum=float(np.median(X.sum(axis=1))) if counted else 1.0),
        form=Form(sparse_input=True, gram_decoder=not counted),
    )
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
        # One call for all steps, as in a fit: PyTorch's steps do not wait for one another either.
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
    """Most MiB of the GPU's memory that the library has taken."""
    if library == "narrows":
        import cupy

        return float(cupy.get_default_memory_pool().total_bytes()) / 2**20
    import torch

    return float(torch.cuda.max_memory_reserved()) / 2**20


class Contender:
    """One library at one case, in its own process (see `harness`)."""

    def start(self, case: str, library: str, threads: int) -> dict[str, Any]:
        # In every process: what the libraries themselves take is not the question.
        if installed(["torch"]):
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


def measure(case: str, libraries: list[str], threads: int, rounds: int) -> dict[str, Any]:
    """Milliseconds and memory of each library, narrows first."""
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker("counts", name)) for name in libraries]
        found = {w.name: w.ask("start", case=case, library=w.name, threads=threads) for w in workers}
        for name, answer in found.items():
            for a, b in zip(answer["losses"], found["narrows"]["losses"], strict=True):
                if abs(a - b) > TOLERANCE * abs(b):
                    raise RuntimeError(f"{case}: {name} trains another model than narrows: losses {a} and {b}")
        result = in_turns(workers, rounds)
    for name, answer in found.items():
        result[name]["peak_mib"] = answer["peak"] - answer["before"]
        result[name]["step_mib"] = answer["peak"] - answer["held"]
    return result


def main() -> None:
    options_parser = comparing(__doc__, locked="during each case", rounds=9, known=tuple(CASES), devices=DEVICES)
    options = parsed(options_parser)
    cases = chosen(options_parser, "--cases", options.cases, tuple(CASES))
    from narrows.backends import probe, resolve

    torch = ["torch"] if installed(["torch"]) else []
    report = header(
        torch,
        threads=options.threads,
        rounds=options.rounds,
        backend=probe(resolve(BACKEND[options.device])).reason,
        targets={"ratio": {name: CASES[name].targets for name in cases}, "memory": MEMORY_TARGET},
        ms={},
    )
    libraries = ["narrows", *(["torch", "torch.compile"] if torch else [])]
    for case in cases:
        with lock(options.lock):
            report["ms"][case] = measure(case, libraries, options.threads, options.rounds)
        for name, figures in report["ms"][case].items():
            print(
                f"{case}  {name:14s} {figures['median']:8.2f} ms  ratio {figures['ratio']:.2f}  "
                f"{figures['peak_mib']:.0f} MiB with the data, {figures['step_mib']:.0f} MiB of steps",
                flush=True,
            )
    finish(report, "counts", options)


if __name__ == "__main__":
    script(main, Contender)
