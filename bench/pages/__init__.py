"""Pages of the documentation that come from stored results.

Promises: a page follows from `results` alone, docs/performance.md also from its own text; it needs no measured library.
"""

from pathlib import Path

from bench.pages import accuracy, benchmarks, profiles, reproduction
from bench.support.results import DOCS, RESULTS

PAGES = {
    "accuracy.md": accuracy.render,
    "benchmarks.md": benchmarks.render,
    "performance.md": profiles.render,
    "reproduction.md": reproduction.render,
}


def write(results: Path = RESULTS, docs: Path = DOCS) -> None:
    """Write all pages again."""
    docs.mkdir(parents=True, exist_ok=True)
    for name, render in PAGES.items():
        (docs / name).write_text(render(results), encoding="utf-8")
