"""The profiles in docs/performance.md, from the stored results.

Promises: what stands between the two marks is a function of `results/profile-*.json` alone; the rest is left as it is.
"""

from __future__ import annotations

import json
from typing import Any

from bench.pages.benchmarks import RESULTS, ROOT, cpu, table

PAGE = ROOT / "docs" / "performance.md"
CASES = ("hinton", "keras-deep", "keras-simple")
BEGIN, END = "<!-- from bench/results/profile-*.json -->\n", "<!-- end -->\n"


def by_kind(report: dict[str, Any]) -> dict[str, str]:
    """Milliseconds, share of the ops' sum and, of products, GFLOP/s of each kind of op."""
    total = sum(op["ms"] for op in report["ops"])
    cells = {}
    for kind in dict.fromkeys(op["op"] for op in report["ops"]):
        ops = [op for op in report["ops"] if op["op"] == kind]
        ms = sum(op["ms"] for op in ops)
        gflop = sum(op["gflop_per_s"] * op["ms"] for op in ops if op["gflop_per_s"]) / 1e3
        cells[kind] = f"{ms:.3g}, {ms / total:.0%}" + (f", {gflop / ms * 1e3:.0f}" if gflop else "")
    return cells


def profiles() -> str:
    """The table of what is stored now."""
    reports = {case: json.loads((RESULTS / f"profile-{case}.json").read_text(encoding="utf-8")) for case in CASES}
    columns = {case: by_kind(report) for case, report in reports.items()}
    steps = {case: report["steps"][0] for case, report in reports.items()}
    kinds = dict.fromkeys(kind for cells in columns.values() for kind in cells)
    rows = [[f"`{kind}`", *(columns[case].get(kind, "-") for case in CASES)] for kind in kinds]
    rows += [
        ["step, timed alone", *(f"{steps[case]['ms']:.3g}" for case in CASES)],
        ["products at the peak (floor)", *(f"{steps[case]['floor_ms']:.3g}" for case in CASES)],
        [
            "peak, exchange between cores",
            *(
                f"{machine['fma_gflops']:.0f} GFLOP/s, {machine['exchange_gb_s']:.0f} GB/s"
                for machine in (steps[case]["machine"] for case in CASES)
            ),
        ],
    ]
    first = reports[CASES[0]]
    about = f"{first['date']}, {cpu(first)}, {first['threads']} threads, narrows {first['narrows']}."
    return "\n".join(["", *table(["op", *CASES], rows), "", about, "", ""])


def current() -> str:
    """The page with the profiles of what is stored now."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    return before + BEGIN + profiles() + END + rest.split(END)[1]


def write() -> None:
    """Write the page anew."""
    PAGE.write_text(current(), encoding="utf-8")
