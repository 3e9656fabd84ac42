"""Time of each op inside the training steps of the standard cases, on the C++ backend.

Usage: ``python bench/speed/profiles.py [--cases hinton,tabular] [--threads 2] [--seconds 2] [--results DIR]
[--lock FILE]``. docs/performance.md shows the result.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.support.results import header
from bench.support.scripts import chosen, finish, lock, parsed, parser, script, with_threads
from narrows.benchmark import CASES, profile_ops, time_steps

SHOWN = "hinton,keras-deep,keras-simple"


def main() -> None:
    options_parser = with_threads(parser(__doc__, locked="during each case"))
    options_parser.add_argument("--cases", default=SHOWN)
    options_parser.add_argument("--seconds", type=float, default=2.0, help="of each timing")
    options = parsed(options_parser)
    by_name = {case.name: case for case in CASES}
    report = header(threads=options.threads, cases={})
    for name in chosen(options_parser, "--cases", options.cases, tuple(by_name)):
        with lock(options.lock):
            step = time_steps(by_name[name], "cpp", n_threads=options.threads, seconds=options.seconds)
            ops = profile_ops(by_name[name], n_threads=options.threads, seconds=options.seconds)
        report["cases"][name] = {"step": asdict(step), "ops": [asdict(op) for op in ops]}
        print(f"{name}: {step.ms:.4g} ms a step", flush=True)
    finish(report, "profiles", options)


if __name__ == "__main__":
    script(main)
