"""The command bench: the speed of training steps on this machine, as a table and optionally a JSON file.

`narrows.benchmark` measures; this module only formats. The file is written at the end, complete or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from .. import benchmark
from .._version import __version__
from ..backends import AUTO, probe, resolve
from ..benchmark import CASES, Case, OpTiming, StepTiming
from ..machine import thread_choice, usable_cpus
from ..persistence import atomic_write
from .settings import UsageError, did_you_mean, in_flags
from .tables import check_output

__all__ = ["bench"]

log = logging.getLogger("narrows")

_STEP_COLUMNS = ("case", "backend", "ms/step", "quartiles", "examples/s", "GFLOP/s", "floor ms", "of peak")
_STEP_WIDTHS = (-max(len(c.name) for c in CASES), -9, 9, 16, 12, 9, 9, 8)
_OP_COLUMNS = ("op", "operands", "size", "ms", "share", "GFLOP/s")


def bench(
    *,
    cases: str | None = None,
    ops: str | None = None,
    backend: str | None = None,
    threads: int | None = None,
    seconds: float = 20.0,
    json_file: Path | None = None,
) -> None:
    """Time training steps of the standard cases, or the ops within the steps of one case.

    Parameters
    ----------
    cases : str, optional
        Names separated by commas; all by default.
    ops : str, optional
        Name of one case; its ops are timed on the C++ backend.
    backend : str, optional
        By default each backend in `AUTO` that can run.
    threads : int, optional
    seconds : float
        Total time of all timings.
    json_file : Path, optional

    Raises
    ------
    UsageError
        A case is unknown, or the ops of the backend cannot be timed.
    OutputError
        `json_file` cannot be written.
    BackendError
        The backend cannot run here.
    """
    chosen = _cases("--ops", ops) if ops is not None else _cases("--cases", cases)
    if ops is not None and backend not in (None, "auto", "cpp"):
        raise UsageError(f"--ops works with the backend cpp only: leave out --backend {backend}")
    if json_file is not None:
        check_output(json_file, (".json",))
    try:
        n_threads, threads_from = thread_choice(threads)
        threads_from = in_flags(threads_from)
        backends = [resolve("cpp")] if ops is not None else _backends(backend)
    except ValueError as error:  # an environment variable
        raise UsageError(str(error)) from None
    found = probe("cpp")
    if not found.ok:
        log.warning(
            "backend cpp cannot run here (%s), so the peak of multiply-adds and the floor are not measured",
            found.reason,
        )
    cpus = usable_cpus()[0]
    if found.ok and n_threads > cpus:
        log.warning("%d threads on %d CPUs: the floor is computed for the number of CPUs", n_threads, cpus)
    about: dict[str, Any] = {
        "narrows": __version__,
        "date": date.today().isoformat(),
        "machine": benchmark.machine(),
        "threads": n_threads,
        "threads_from": threads_from,
        "backends": {name: probe(name).reason for name in backends},
    }
    cpu = about["machine"]["cpu"].get("model name") or "unknown CPU"
    print(f"narrows {__version__} on {cpu}, threads: {n_threads} ({threads_from})")
    print("; ".join(f"{name}: {reason}" for name, reason in about["backends"].items()))
    print()

    share = seconds / (len(chosen) * len(backends) + (ops is not None))
    timings: list[StepTiming] = []
    _print_row(_STEP_COLUMNS, _STEP_WIDTHS)
    for case in chosen:
        for name in backends:
            timings.append(benchmark.time_steps(case, name, n_threads=n_threads, seconds=share))
            _print_row(_step_row(timings[-1]), _STEP_WIDTHS)
    profile: list[OpTiming] = []
    if ops is not None:
        profile = benchmark.profile_ops(chosen[0], n_threads=n_threads, seconds=share)
        print()
        _print_ops(profile)
    _print_machine(timings, min(n_threads, cpus))

    if json_file is not None:
        report = about | {"steps": [_plain(t) for t in timings], "ops": [_plain(t) for t in profile]}
        atomic_write(json_file, (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
        log.info("wrote %s", json_file)


def _cases(flag: str, names: str | None) -> list[Case]:
    known = {case.name: case for case in CASES}
    if names is None:
        return list(CASES)
    wanted = [names] if flag == "--ops" else [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in known:
            raise UsageError(f"{flag}: {name!r} is not one of {', '.join(known)}{did_you_mean(name, known)}")
    return [known[name] for name in dict.fromkeys(wanted)]


def _backends(name: str | None) -> list[str]:
    if name is None and not os.environ.get("NARROWS_BACKEND"):
        able = [candidate for candidate in AUTO if probe(candidate).ok]
        return able or [resolve("auto")]  # raises an error that gives the reason
    return [resolve(name or "auto")]


def _plain(timing: StepTiming | OpTiming) -> dict[str, Any]:
    return dataclasses.asdict(timing)


def _figure(x: float | None) -> str:
    if x is None:
        return "-"
    return f"{x:#.3g}".rstrip(".") if x < 999.5 else f"{x:,.0f}"


def _step_row(t: StepTiming) -> tuple[str, ...]:
    return (
        t.case, t.backend, _figure(t.ms), f"{_figure(t.ms_q1)} - {_figure(t.ms_q3)}", _figure(t.examples_per_s),
        _figure(t.gflop_per_s), _figure(t.floor_ms), "-" if t.peak_share is None else f"{t.peak_share:.0%}",
    )  # fmt: skip


def _print_row(cells: Sequence[str], widths: Sequence[int]) -> None:
    """Print one line. A negative width aligns to the left."""
    padded = (cell.ljust(-w) if w < 0 else cell.rjust(w) for cell, w in zip(cells, widths, strict=True))
    print(" ".join(padded).rstrip(), flush=True)


def _print_ops(profile: list[OpTiming]) -> None:
    rows = [
        (
            t.op,
            t.operands,
            t.size,
            f"{t.ms:.4f}",
            f"{t.share:.1%}",
            "" if t.gflop_per_s is None else _figure(t.gflop_per_s),
        )
        for t in profile
    ]
    rows.append(("step", "", "", f"{sum(t.ms for t in profile):.4f}", "100.0%", ""))
    columns = zip(_OP_COLUMNS, *rows, strict=True)
    widths = [max(map(len, column)) * (-1 if i < 3 else 1) for i, column in enumerate(columns)]
    for row in (_OP_COLUMNS, *rows):
        _print_row(row, [w + (2 if w > 0 else -2) for w in widths])


def _print_machine(timings: list[StepTiming], threads: int) -> None:
    """Print the range of the machine's own figures, measured beside each timing."""
    probes = [t.machine for t in timings if t.machine is not None]
    if not probes:
        return
    low, high = ({name: pick(p[name] for p in probes) for name in probes[0]} for pick in (min, max))
    span = {n: " to ".join(dict.fromkeys((_figure(low[n]), _figure(high[n])))) for n in low}
    text = f"machine: multiply-add peak {span['fma_gflops']} GFLOP/s"
    if threads > 1:
        text += f", exchange between cores {span['exchange_gb_s']} GB/s, barrier {span['barrier_us']} us"
    print(f"\n{text}", flush=True)
    if high["fma_gflops"] > 1.1 * low["fma_gflops"] or high["exchange_gb_s"] > 1.5 * low["exchange_gb_s"]:
        log.warning("the speed of the machine changed during the timings; --json records it for each timing")
