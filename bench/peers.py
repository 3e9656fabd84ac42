"""Training beside other libraries, in one run on one machine.

Usage: ``python bench/peers.py [--cases keras-deep,memory,...] [--device cuda] [--threads 2] [--rounds 15] [--out FILE]
[--lock FILE]`` in an environment that holds narrows and the peers (``pip install torch jax tensorflow``); a peer that
is not installed is left out, and the result says so.

A library's figure is that of its fastest way to train. Beside it stands that of its fastest usual way: a call for each
step, or the library's own `fit`; not a whole epoch of prepared batches in one compiled call.

Each library runs in a process of its own and they take turns, so that a machine that changes its speed changes it for
all: figures are the median and the quartiles over rounds, a ratio is the median of the ratios of each round. All train
the same network from the same weights on the same batches, and a library whose losses are others ends the run.
A part of the cases replaces its entries in a stored result of the same machine and versions.

With ``--device cuda`` narrows takes its CUDA backend, PyTorch and JAX the GPU, and the result is another file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import statistics
import sys
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.libraries.cases import CASES, FIT_ROWS, OVERALL_TARGET, Case, check_losses, reference_losses
from bench.libraries.contenders import ON_GPU, TAKING_PART
from bench.pages import benchmarks as page
from bench.support.harness import (
    DEVICES,
    RESULTS,
    Worker,
    device,
    interleaved,
    lock,
    of_gpu,
    prepare,
    script,
    spread,
    store,
)
from narrows import __version__
from narrows.backends import probe, resolve
from narrows.benchmark import machine
from narrows.errors import BackendError

MODULES = {"pytorch": ["torch"], "pytorch-compile": ["torch"], "jax": ["jax"], "keras": ["keras", "tensorflow"]}
"""Of each peer."""
MEMORY = "memory"
FIT_ROUNDS = 3
OUTS = {"cpu": RESULTS / "peers.json", "cuda": RESULTS / "peers-cuda.json"}


def installed(peer: str) -> bool:
    return all(importlib.util.find_spec(module) for module in MODULES[peer])


def versions() -> dict[str, str]:
    """Of the modules of the peers that are here."""
    owners = importlib.metadata.packages_distributions()
    modules = dict.fromkeys(module for peer in MODULES if installed(peer) for module in MODULES[peer])
    return {module: importlib.metadata.version(owners[module][0]) for module in modules}


def cases_of(device: str) -> list[Case]:
    """Those of a device: tf32 is of a GPU's products."""
    return [case for case in CASES if case.precision != "tf32" or device == "cuda"]


def measure(case: Case, threads: int, rounds: int) -> dict[str, Any]:
    names = ["narrows", *(peer for peer in MODULES if installed(peer))]
    if case.precision == "float32" and resolve("auto") != "numba" and probe("numba").ok:
        names.append("narrows-numba")
    names = [name for name in names if name in TAKING_PART.get(type(case), names)]
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
                raise RuntimeError(f"{case.name}: {worker.name} has not learnt: loss {loss}, early on {reference[-1]}")
    own = [turn["ms"] for turn in turns["narrows"]]
    for name in names:
        result["contenders"][name] |= spread([turn["ms"] for turn in turns[name]])
        if name != "narrows":
            for ratio, ms in (("ratio", "ms"), ("usual_ratio", "usual_ms")):
                found = [turn[ms] for turn in turns[name]]
                result[ratio][name] = spread([a / b for a, b in zip(found, own, strict=True)])
    probes = [turn["probe"] for turn in turns["narrows"] if "probe" in turn]
    result["probe"] = {key: statistics.median(p[key] for p in probes) for key in probes[0]} if probes else {}
    # By the ratios, which a machine that changes its speed leaves alone, unlike the medians.
    peers = [name for name in names if name in MODULES]
    for fastest, ratio in (("fastest", "ratio"), ("usual_fastest", "usual_ratio")):
        result[fastest] = min(peers, key=lambda name: result[ratio][name]["median"], default=None)
    return result


def measure_fit(case: Case, threads: int) -> dict[str, Any]:
    """Share of a step in the time that a whole fit takes for one."""
    with Worker("libraries.training", "narrows fit") as worker:
        answer = worker.ask("fit", case=case.name, threads=threads, rounds=FIT_ROUNDS)
    check_losses(case, "Autoencoder.fit", answer["losses"], reference_losses(case))
    share = statistics.median(a / b for a, b in zip(answer["step_ms"], answer["fit_ms"], strict=True))
    medians = {key: statistics.median(answer[key]) for key in ("step_ms", "fit_ms")}
    return medians | {"share": share, "epochs": answer["epochs"], "rows": FIT_ROWS}


def measure_memory(threads: int) -> dict[str, Any]:
    result = {}
    for name in ("narrows", *(["pytorch"] if installed("pytorch") else [])):
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
    """Geometric means of the ratios to the fastest peer over the dense networks: in its usual ways, and in all."""
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
        share = page.share_of_peak(result)
        print(f"  floor {page.floor_ms(result):.4f} ms, {share:.0%} of it reached;", result["probe"])
    if "fit" in result:
        print(f"  fit: {result['fit']['share']:.0%} of the step's speed", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", help="by default all, on a GPU without memory")
    parser.add_argument("--device", choices=DEVICES, default=DEVICES[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="by default in bench/results")
    parser.add_argument("--lock", type=Path, help="file to hold a lock on during each case, as flock(1) does")
    options = parser.parse_args()
    out = options.out or OUTS[options.device]
    choices = [*(case.name for case in cases_of(options.device)), MEMORY]
    if options.device == "cuda":
        # What a process takes of the host's memory says nothing there.
        choices.remove(MEMORY)
    wanted = options.cases.split(",") if options.cases else choices
    if unknown := [n for n in wanted if n not in choices]:
        parser.error(f"--cases: {unknown[0]!r} is not one of {', '.join(choices)}")
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    try:
        prepare(options.threads, options.device)
        resolve("auto")
    except (ValueError, BackendError) as error:
        parser.error(str(error))
    header = {
        "machine": machine(),
        "threads": options.threads,
        "narrows": __version__,
        "backend": probe(resolve("auto"))._asdict() | {"name": resolve("auto")},
        "versions": versions(),
        "missing": [peer for peer in MODULES if not installed(peer)],
        **of_gpu(),
    }
    for peer in header["missing"]:
        print(f"{peer} is not installed and is left out")
    report: dict[str, Any] = header | {"cases": {}, "memory": {}}
    if wanted != choices and out.exists():
        stored = json.loads(out.read_text())
        if {key: stored.get(key) for key in header} != header:
            parser.error(f"{out} holds another machine, other versions or threads: give --out, or all cases")
        report = stored
    measured = {"date": date.today().isoformat(), "rounds": options.rounds}
    for case in cases_of(options.device):
        if case.name not in wanted:
            continue
        with lock(options.lock):
            result = measure(case, options.threads, options.rounds)
            result = describe(case) | measured | result
            if case.layout is not None:
                result["fit"] = measure_fit(case, options.threads)
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
    store(report, out)
    if out in OUTS.values():
        page.write()


if __name__ == "__main__":
    script(main)
