"""Training beside other libraries, in one run on one machine.

Usage: ``python bench/peers.py [--cases keras-deep,memory,...] [--device cuda] [--threads 2] [--rounds 15]
[--results DIR] [--lock FILE]``. Install the libraries beside narrows (``pip install torch jax tensorflow``); the run
leaves out a library that is not installed, and the result says so. docs/benchmarks.md shows the result.

- Each library runs in its own process, and the processes take turns, so a machine that changes its speed changes it for
  all. Figures are the median and the quartiles over the rounds. A ratio is the median of the ratios of each round.
- All libraries train the same network from the same weights on the same batches. A library with other losses ends the
  run.
- A library has two figures: its fastest way to train, and its fastest usual way (one call for each step, or the
  library's own `fit`). One compiled call for a whole epoch of prepared batches is not a usual way.
- A run of some cases replaces their entries in the stored result, if machine, versions and threads are the same.
- With ``--device cuda`` narrows, PyTorch and JAX use the GPU.
"""

from __future__ import annotations

import importlib.metadata
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.libraries.cases import CASES, FIT_ROWS, OVERALL_TARGET, Case, check_losses, reference_losses
from bench.libraries.contenders import ON_GPU, taking_part
from bench.pages.benchmarks import floor_ms, share_of_peak
from bench.support.harness import DEVICES, Worker, device, installed, interleaved, spread
from bench.support.results import header, load, path_of
from bench.support.scripts import chosen, comparing, finish, lock, parsed, script
from narrows.backends import probe, resolve
from narrows.errors import BackendError

MODULES = {
    "pytorch": ["torch"],
    "pytorch-compile": ["torch"],
    "jax": ["jax"],
    "keras": ["keras", "tensorflow"],
    "numpy": ["numpy"],
}
"""Modules of each other library."""
MEMORY = "memory"
FIT_ROUNDS = 3


def here() -> list[str]:
    """The other libraries that are installed."""
    return [peer for peer, modules in MODULES.items() if installed(modules)]


def packages() -> list[str]:
    """Packages of the installed libraries."""
    owners = importlib.metadata.packages_distributions()
    return [owners[module][0] for module in dict.fromkeys(module for peer in here() for module in MODULES[peer])]


def cases_of(device: str) -> list[Case]:
    """The cases of a device: only GPUs have TF32."""
    return [case for case in CASES if case.precision != "tf32" or device == "cuda"]


def measure(case: Case, threads: int, rounds: int) -> dict[str, Any]:
    names = ["narrows", *here()]
    if resolve("auto") != "numba" and probe("numba").ok:
        names.append("narrows-numba")
    names = [name for name in names if name in taking_part(case)]
    if device() == "cuda":
        names = [name for name in names if name in ON_GPU]
    reference = reference_losses(case)
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker("libraries.training", name)) for name in names]
        result: dict[str, Any] = {"contenders": {}, "ratio": {}, "usual_ratio": {}}
        for worker in workers:
            ready = worker.ask("start", contender=worker.name, case=case.name, threads=threads)
            for variant, losses in ready.pop("losses").items():
                check_losses(case, f"{worker.name} ({variant})", losses, reference)
            result["contenders"][worker.name] = ready
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for worker in interleaved(workers, rounds):
            turns[worker.name].append(worker.ask("turn"))
        for worker in workers:
            loss = worker.ask("end")
            if not loss < reference[-1]:
                raise RuntimeError(
                    f"{case.name}: {worker.name} has not learnt: its last loss is {loss}, the reference had "
                    f"{reference[-1]} after a few epochs"
                )
    own = [turn["ms"] for turn in turns["narrows"]]
    for name in names:
        result["contenders"][name] |= spread([turn["ms"] for turn in turns[name]])
        if name != "narrows":
            for ratio, ms in (("ratio", "ms"), ("usual_ratio", "usual_ms")):
                found = [turn[ms] for turn in turns[name]]
                result[ratio][name] = spread([a / b for a, b in zip(found, own, strict=True)])
    probes = [turn["probe"] for turn in turns["narrows"] if "probe" in turn]
    result["probe"] = {key: statistics.median(p[key] for p in probes) for key in probes[0]} if probes else {}
    # Ratios decide, not medians: a machine that changes its speed does not change ratios.
    peers = [name for name in names if name in MODULES]
    for fastest, ratio in (("fastest", "ratio"), ("usual_fastest", "usual_ratio")):
        result[fastest] = min(peers, key=lambda name: result[ratio][name]["median"], default=None)
    return result


def measure_fit(case: Case, threads: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step in a whole fit and in the plan alone, and their ratio."""
    with Worker("libraries.training", "narrows fit") as worker:
        answer = worker.ask("fit", case=case.name, threads=threads, rounds=rounds)
    check_losses(case, "Autoencoder.fit", answer["losses"], reference_losses(case))
    share = statistics.median(a / b for a, b in zip(answer["step_ms"], answer["fit_ms"], strict=True))
    medians = {key: statistics.median(answer[key]) for key in ("step_ms", "fit_ms")}
    return medians | {"share": share, "epochs": answer["epochs"], "rows": FIT_ROWS}


def measure_memory(threads: int) -> dict[str, Any]:
    result = {}
    for name in ("narrows", *(["pytorch"] if "pytorch" in here() else [])):
        with Worker("libraries.memory", f"memory of {name}") as worker:
            result[name] = worker.ask("measure", library=name, threads=threads)
    return result


def describe(case: Case) -> dict[str, Any]:
    return {
        "widths": case.widths,
        "batch": case.batch,
        "loss": case.loss,
        "precision": case.precision,
        "gflop": case.plan().flops / 1e9,
        "target": case.gpu_target if device() == "cuda" else case.target,
    }


def overall(results: dict[str, Any]) -> dict[str, Any]:
    """Geometric means over the dense networks of the ratios to the fastest library: in usual ways, and in all ways."""
    dense = [case.name for case in cases_of(device()) if type(case) is Case]
    compared = [results[name] for name in dense if name in results and results[name]["fastest"]]
    means = {
        mean: statistics.geometric_mean(case[ratio][case[fastest]]["median"] for case in compared) if compared else None
        for mean, ratio, fastest in (
            ("geometric_mean", "ratio", "fastest"),
            ("usual_geometric_mean", "usual_ratio", "usual_fastest"),
        )
    }
    return means | {"cases": len(compared), "of": len(dense), "target": OVERALL_TARGET}


def say(name: str, result: dict[str, Any]) -> None:
    print(name)
    for contender, found in result["contenders"].items():
        ratio = "".join(
            f"  {result[r][contender]['median']:.2f}x" for r in ("usual_ratio", "ratio") if contender in result[r]
        )
        print(f"  {contender:16} {found['median']:9.4f} ms{ratio}  ({found['variant']})")
    if result["probe"]:
        print(f"  floor {floor_ms(result):.4f} ms, {share_of_peak(result):.0%} of the peak;", result["probe"])
    if "fit" in result:
        print(f"  fit: {result['fit']['share']:.0%} of the step's speed", flush=True)


def main() -> None:
    names = dict.fromkeys([*(case.name for case in CASES), MEMORY])
    options_parser = comparing(__doc__, locked="during each case", rounds=15, known=tuple(names), devices=DEVICES)
    try:
        options = parsed(options_parser)
        backend = resolve("auto")
    except BackendError as error:
        options_parser.error(str(error))
    choices = [case.name for case in cases_of(options.device)]
    if options.device == "cpu":
        # On a GPU, the memory that a process takes on the host tells nothing.
        choices.append(MEMORY)
    wanted = chosen(options_parser, "--cases", options.cases, choices)
    common = header(
        packages(),
        threads=options.threads,
        backend=probe(backend)._asdict() | {"name": backend},
        missing=[peer for peer in MODULES if peer not in here()],
    )
    for peer in common["missing"]:
        print(f"{peer} is not installed and is left out")
    report: dict[str, Any] = common | {"cases": {}, "memory": {}}
    stored = load(path_of(common, "peers", options.results))
    if stored and wanted != choices:
        differing = [key for key in common if key != "date" and stored.get(key) != common[key]]
        if differing:
            options_parser.error(
                f"{path_of(common, 'peers', options.results)} has other {', '.join(differing)}: run all cases, or give "
                "another --results"
            )
        report = stored | {"date": common["date"]}
    measured = {"date": common["date"], "rounds": options.rounds}
    for case in cases_of(options.device):
        if case.name not in wanted:
            continue
        with lock(options.lock):
            result = describe(case) | measured | measure(case, options.threads, options.rounds)
            if case.layout:
                result["fit"] = measure_fit(case, options.threads, min(FIT_ROUNDS, options.rounds))
        report["cases"][case.name] = result
        say(case.name, result)
    if MEMORY in wanted:
        with lock(options.lock):
            report["memory"] = measured | {"libraries": measure_memory(options.threads)}
        print(MEMORY, report["memory"]["libraries"])
    order = [case.name for case in CASES if case.name in report["cases"]]
    report["cases"] = {name: report["cases"][name] for name in order}
    report["overall"] = overall(report["cases"])
    print("overall", report["overall"])
    finish(report, "peers", options)


if __name__ == "__main__":
    script(main)
