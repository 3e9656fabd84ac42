"""Stored results: one folder for each machine, one file for each experiment.

Promises:

- Each file holds `date`, `machine` and `versions`.
- The folder's name follows from `machine`, or from `gpu` where the result was taken on a GPU.

Never: imports a library that is measured before `header` is called, so that pages can be written without any.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.support.harness import ROOT, device

RESULTS = ROOT / "bench" / "results"
DOCS = ROOT / "docs"
Report = dict[str, Any]


def cpu_name(report: Report) -> str:
    """The CPU's name without trade marks and clock rate."""
    name = report["machine"]["cpu"].get("model name", "")
    return " ".join(re.sub(r"\((r|tm)\)|\b(cpu|processor)\b|\b\d+-core\b|@.*", " ", name, flags=re.IGNORECASE).split())


def slug(report: Report) -> str:
    """Name of the machine's folder: the GPU, or the CPU with its family, model, cores and instruction set."""
    machine = report["machine"]
    if "gpu" in report:
        text = report["gpu"]["name"]
    else:
        cpu = machine["cpu"]
        numbers = [f"{word} {cpu[key]}" for key, word in (("cpu family", "family"), ("model", "model")) if key in cpu]
        text = " ".join([cpu_name(report), *numbers, f"{machine['cores']}c", machine["isa"]])
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def path_of(report: Report, name: str, results: Path = RESULTS) -> Path:
    """The file of an experiment on the report's machine."""
    return results / slug(report) / f"{name}.json"


def load(path: Path) -> Report:
    """A stored report; empty if there is none."""
    found: Report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def store(report: Report, name: str, results: Path = RESULTS) -> None:
    path = path_of(report, name, results)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def reports(name: str, results: Path = RESULTS, *, gpu: bool = False) -> list[Report]:
    """The stored reports of an experiment, one for each machine; on CPUs or on GPUs."""
    found = [load(path) for path in sorted(results.glob(f"*/{name}.json"))]
    return [report for report in found if ("gpu" in report) == gpu]


def header(packages: Iterable[str] = (), **more: Any) -> Report:
    """What every report begins with: date, machine and versions, then `more`."""
    from narrows import __version__
    from narrows.benchmark import machine

    versions = {"narrows": __version__} | {name: version(name) for name in packages}
    return {"date": date.today().isoformat(), "machine": machine(), "versions": versions} | more | _gpu()


def _gpu() -> Report:
    """Name and driver of the GPU and the version of CuPy, if libraries are compared on a GPU."""
    if device() != "cuda":
        return {}
    import cupy

    found = {"name": cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()}
    asked = ("driver_version", "memory.total", "clocks.max.sm")
    command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader"]
    try:
        out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
        found |= dict(zip(asked, out.splitlines()[0].split(", "), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        pass  # some containers have a GPU but not its tools
    return {"gpu": found | {"cupy": cupy.__version__}}
