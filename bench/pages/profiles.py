"""The profiles in docs/performance.md, from the results of `bench/speed/profiles.py`.

Promises: only the text between the two marks changes; the rest of the page stays as it is.
"""

from __future__ import annotations

from pathlib import Path

from bench.pages.tables import Part, section
from bench.support.results import DOCS, Report, reports

BEGIN, END = "<!-- from bench/results -->\n", "<!-- end -->\n"


def by_kind(report: Report) -> dict[str, str]:
    """For each kind of op: milliseconds, share of the step, and GFLOP/s if it is a matrix product."""
    total = sum(op["ms"] for op in report["ops"])
    cells = {}
    for kind in dict.fromkeys(op["op"] for op in report["ops"]):
        ops = [op for op in report["ops"] if op["op"] == kind]
        ms = sum(op["ms"] for op in ops)
        gflop = sum(op["gflop_per_s"] * op["ms"] for op in ops if op["gflop_per_s"]) / 1e3
        cells[kind] = f"{ms:.3g}, {ms / total:.0%}" + (f", {gflop / ms * 1e3:.0f}" if gflop else "")
    return cells


def profile(report: Report) -> Part:
    cases = report["cases"]
    columns = {name: by_kind(case) for name, case in cases.items()}
    steps = {name: case["step"] for name, case in cases.items()}

    def row(name: str, form: str) -> list[str]:
        return [name, *(form.format(**steps[case], **steps[case]["machine"]) for case in cases)]

    kinds = dict.fromkeys(kind for cells in columns.values() for kind in cells)
    rows = [[f"`{kind}`", *(columns[case].get(kind, "-") for case in cases)] for kind in kinds]
    rows += [
        row("step, timed alone", "{ms:.3g}"),
        row("products at the peak (floor)", "{floor_ms:.3g}"),
        row("peak, exchange between cores", "{fma_gflops:.0f} GFLOP/s, {exchange_gb_s:.0f} GB/s"),
    ]
    return Part([], ["op", *cases], rows)


def render(results: Path) -> str:
    before, rest = (DOCS / "performance.md").read_text(encoding="utf-8").split(BEGIN)
    lines = section("### Ops inside a step", reports("profiles", results), profile)
    return before + BEGIN + "\n".join([*lines, "", END]) + rest.split(END)[1]
