"""Training steps side by side with other libraries, in one run on one machine.

Usage: ``python bench/peers.py [--cases keras-deep,...] [--threads 2] [--rounds 15] [--out bench/results/peers.json]``
in an environment that holds narrows and the peers (``pip install torch``); a peer that is not installed is left out,
and the result says so. docs/benchmarks.md is written from the result. Rounds are interleaved (narrows, peer, narrows,
...), so that a machine that changes its speed changes it for both; figures are the median and the quartiles over
rounds, the ratio is the median of the ratios of each round.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from narrows import __version__
from narrows.backends import Hyper, compile_plan, probe, resolve
from narrows.benchmark import CASES, Case, machine
from narrows.plan import Loss

STEPS = 20
"""Training steps of one round, on as many different batches."""


Round = Callable[[], object]
"""STEPS training steps."""


def narrows_round(backend: str) -> Callable[[Case, np.ndarray, int], Round]:
    def make(case: Case, X: np.ndarray, threads: int) -> Round:
        plan = case.plan()
        program = compile_plan(plan, backend, n_threads=threads)
        rng = np.random.default_rng(0)
        program.load(
            {s.name: (rng.standard_normal((s.rows, s.cols)) * 0.05).astype(np.float32) for s in plan.parameters}
        )
        program.bind(X)
        rows, hyper = np.arange(len(X)), Hyper(0, 0, np.full(STEPS, 1e-3))
        return lambda: program.train(rows, hyper)

    return make


def torch_round(case: Case, X: np.ndarray, threads: int) -> Round:
    import torch
    from torch import nn

    torch.set_num_threads(threads)
    modules: list[nn.Module] = []
    for n_in, n_out in zip(case.widths, case.widths[1:], strict=False):
        modules += [nn.Linear(n_in, n_out), nn.ReLU()]
    model = nn.Sequential(*modules[:-1])
    criterion = nn.BCEWithLogitsLoss() if case.loss is Loss.BCE else nn.MSELoss()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    data = torch.from_numpy(X)

    def run() -> None:
        for x in data.split(case.batch):
            optimiser.zero_grad()
            criterion(model(x), x).backward()
            optimiser.step()

    return run


def contenders() -> Iterator[tuple[str, Callable[[Case, np.ndarray, int], Round]]]:
    yield "narrows", narrows_round(resolve("auto"))
    if resolve("auto") != "numba" and probe("numba").ok:
        yield "narrows (numba)", narrows_round("numba")
    try:
        import torch

        yield f"PyTorch {torch.__version__} eager, fused Adam", torch_round
    except ImportError:
        return


def timed(run: Round) -> float:
    """Milliseconds of a step."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) / STEPS * 1e3


def measure(case: Case, threads: int, rounds: int) -> dict[str, Any]:
    X = np.random.default_rng(1).random((STEPS * case.batch, case.widths[0]), dtype=np.float32)
    runs = {name: make(case, X, threads) for name, make in contenders()}
    for run in runs.values():
        timed(run)
    times = {name: np.empty(rounds) for name in runs}
    for i in range(rounds):
        for name, run in runs.items():
            # The threads of the one before spin for a while, and would take the cores from this one.
            time.sleep(0.05)
            run()
            times[name][i] = timed(run)
    gflop = case.plan().flops / 1e9
    result: dict[str, Any] = asdict(case) | {
        "loss": case.loss.name.lower(),
        "gflop": gflop,
        "ms": {},
        "ratio": {},
    }
    for name, t in times.items():
        q1, median, q3 = np.quantile(t, (0.25, 0.5, 0.75))
        result["ms"][name] = {"median": median, "q1": q1, "q3": q3, "gflop_per_s": gflop / median * 1e3}
        if name != "narrows":
            result["ratio"][name] = float(np.median(t / times["narrows"]))
    return result


def page(report: dict[str, Any]) -> str:
    """docs/benchmarks.md from a result."""
    peers = list(dict.fromkeys(name for case in report["cases"] for name in case["ms"]))
    cpu = report["machine"]["cpu"]
    lines = [
        "# Benchmarks",
        "",
        "Written by `bench/peers.py` from `bench/results/peers.json`; do not edit.",
        "",
        f"{report['date']}, {cpu.get('model name', 'unknown CPU')} (family {cpu.get('cpu family', '?')}, model "
        f"{cpu.get('model', '?')}), {report['threads']} threads, backend {report['backend']['name']} "
        f"({report['backend']['reason']}), narrows {report['narrows']}. Milliseconds of one training step (Adam, "
        f"float32, data in memory): median of {report['rounds']} interleaved rounds of {STEPS} steps, quartiles in "
        "brackets; the ratio is the median over rounds of the peer's time by narrows's.",
        "",
        "| case | layers | batch, loss | GFLOP | " + " | ".join(peers) + " |",
        "| --- | --- | --- | --- |" + " --- |" * len(peers),
    ]
    for case in report["cases"]:
        cells = []
        for name in peers:
            t = case["ms"].get(name)
            cell = "" if t is None else f"{t['median']:.3g} [{t['q1']:.3g}, {t['q3']:.3g}]"
            cells.append(cell + (f", {case['ratio'][name]:.2g}x" if name in case["ratio"] else ""))
        widths = "-".join(map(str, case["widths"]))
        about = [case["name"], widths, f"{case['batch']}, {case['loss']}", f"{case['gflop']:.3g}"]
        lines.append(f"| {' | '.join(about + cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(c.name for c in CASES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "peers.json")
    options = parser.parse_args()
    by_name = {c.name: c for c in CASES}
    wanted = options.cases.split(",")
    if unknown := [n for n in wanted if n not in by_name]:
        parser.error(f"--cases: {unknown[0]!r} is not one of {', '.join(by_name)}")
    report = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "narrows": __version__,
        "backend": probe(resolve("auto"))._asdict() | {"name": resolve("auto")},
        "threads": options.threads,
        "rounds": options.rounds,
        "cases": [],
    }
    for name in wanted:
        result = measure(by_name[name], options.threads, options.rounds)
        report["cases"].append(result)
        print(
            name,
            *(f"{n}: {v['median']:.3f} ms" for n, v in result["ms"].items()),
            result["ratio"],
            sep="\n  ",
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    if options.out == parser.get_default("out"):
        (Path(__file__).parent.parent / "docs" / "benchmarks.md").write_text(page(report))


if __name__ == "__main__":
    main()
