"""Sections of a page: one table for all machines, or one for each machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from bench.support.results import Report, cpu_name

WIDEST = 9
"""Columns of a table that is shared by several machines; a wider one is split into a table for each machine."""


class Part(NamedTuple):
    """What one machine's report contributes to a section.

    Attributes
    ----------
    text : list of str
        Lines above the table, such as what the figures mean.
    head, rows : list
        The table.
    keys : int
        Leading columns that say what a row is about; they are the same for all machines.
    after : list of str
        Lines below the table.
    """

    text: list[str]
    head: list[str]
    rows: list[list[str]]
    keys: int = 1
    after: Sequence[str] = ()


def table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def machine_name(report: Report) -> str:
    """The machine as a reader knows it: the GPU, or the CPU with its family and model."""
    if "gpu" in report:
        return str(report["gpu"]["name"])
    cpu = report["machine"]["cpu"]
    return f"{cpu_name(report)} (family {cpu.get('cpu family', '?')}, model {cpu.get('model', '?')})"


def measured(report: Report) -> str:
    """Date, machine and versions of a report."""
    machine, cpu = report["machine"], {key: value for key, value in report.items() if key != "gpu"}
    parts = [f"{machine['cores']} cores", machine["isa"]]
    parts += [f"{report[key]} {key}" for key in ("threads", "rounds") if key in report]
    parts += [f"{name} {version}" for name, version in report["versions"].items()]
    beside = f" with {machine_name(cpu)}" if "gpu" in report else ""
    return f"Measured on {report['date']}, {machine_name(report)}{beside}: {', '.join(parts)}."


def section(title: str, reports: Sequence[Report], part: Callable[[Report], Part]) -> list[str]:
    """A section about all machines, empty if no report has rows for its table.

    Machines share a table if it stays narrow and their texts agree. Otherwise each has its own.
    """
    found = [(report, each) for report in reports if (each := part(report)).rows]
    if not found:
        return []
    reports, parts = [report for report, _ in found], [each for _, each in found]
    first = parts[0]
    lines = ["", title, "", *first.text, *([""] if first.text else [])]
    columns = first.keys + sum(len(each.head) - each.keys for each in parts)
    same = all(each.text == first.text and each.head == first.head and not each.after for each in parts)
    if len(parts) > 1 and same and columns <= WIDEST:
        for report in reports:
            lines += [measured(report), ""]
        return lines + _shared(reports, parts)
    for report, each in zip(reports, parts, strict=True):
        if len(parts) > 1:
            lines += [f"{title.split()[0]}# {machine_name(report)}", ""]
            lines += [*each.text, ""] if each.text != first.text else []
        lines += [measured(report), "", *table(each.head, each.rows), *each.after, ""]
    return lines[:-1]


def _shared(reports: Sequence[Report], parts: Sequence[Part]) -> list[str]:
    """One table with columns for each machine; a machine without a row has empty cells there."""
    keys = parts[0].keys
    head = parts[0].head[:keys]
    rows: dict[tuple[str, ...], list[str]] = {tuple(row[:keys]): [] for each in parts for row in each.rows}
    for report, each in zip(reports, parts, strict=True):
        head += [f"{name}, {machine_name(report)}" for name in each.head[keys:]]
        found = {tuple(row[:keys]): row[keys:] for row in each.rows}
        for key, cells in rows.items():
            cells += found.get(key, [""] * (len(each.head) - keys))
    return table(head, ([*key, *cells] for key, cells in rows.items()))
