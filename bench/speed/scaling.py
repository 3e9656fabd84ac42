"""Batch jobs on matrices of more and more cells: time for a cell and peak memory of ``narrows fit`` and ``encode``.

Usage: ``python bench/speed/scaling.py --folder DIR [--cells 10000,50000,200000] [--genes 20000] [--max-memory 3GB]
[--threads 2] [--results DIR] [--lock FILE]``. `synthetic.py` writes the matrices to DIR (1 GB for 200000 cells of 20000
genes); a matrix that is there already is used again. docs/benchmarks.md shows the result.

A job is one epoch of a negative binomial autoencoder with 128 hidden units, 32 latents and batches of 512 cells,
including all else that ``narrows fit`` does. Then ``narrows encode`` computes the codes of all cells.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.support.results import header
from bench.support.scripts import finish, lock, parsed, parser, script, with_threads

MODEL = ("--estimator", "count", "--loss", "nb", "--hidden", "128", "--components", "32", "--batch-size", "512")


def narrows(*words: object) -> float:
    """Run a command of narrows; returns its seconds."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "narrows", *map(str, words), "--quiet"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"narrows {words[0]} ended with {done.returncode}: {done.stderr.strip()}")
    return time.perf_counter() - start


def matrix(folder: Path, cells: int, genes: int) -> Path:
    path = folder / f"{cells}x{genes}.h5ad"
    if not path.exists():
        script = Path(__file__).parents[1] / "data" / "synthetic.py"
        subprocess.run([sys.executable, script, path, "--cells", str(cells), "--genes", str(genes)], check=True)
    return path


def measure(data: Path, threads: int, memory: str) -> dict[str, Any]:
    common = ("--threads", threads, "--max-memory", memory)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        wall = narrows("fit", data, "--out", run, "--epochs", 1, *MODEL, *common)
        metrics = json.loads((run / "metrics.json").read_text())
        epoch = json.loads((run / "history.jsonl").read_text().splitlines()[-1])
        encode = narrows("encode", run / "model.safetensors", data, "-o", Path(folder, "codes.npy"), *common)
    cells = metrics["n_rows"]
    return {
        "cells": cells,
        "wall_s": wall,
        "epoch_s": epoch["seconds"],
        "epoch_us_per_cell": epoch["seconds"] / cells * 1e6,
        "encode_s": encode,
        "peak_rss_gb": metrics["peak_rss_bytes"] / 1e9,
        "held_out": metrics["held_out_nll_per_row"],
        "file_mb": data.stat().st_size / 1e6,
    }


def main() -> None:
    options_parser = with_threads(parser(__doc__, locked="during each job"))
    options_parser.add_argument("--folder", type=Path, required=True)
    options_parser.add_argument("--cells", default="10000,50000,200000")
    options_parser.add_argument("--genes", type=int, default=20000)
    options_parser.add_argument("--max-memory", default="3GB")
    options = parsed(options_parser)
    report = header(threads=options.threads, genes=options.genes, max_memory=options.max_memory, jobs=[])
    options.folder.mkdir(parents=True, exist_ok=True)
    for cells in map(int, options.cells.split(",")):
        with lock(options.lock):
            data = matrix(options.folder, cells, options.genes)
            report["jobs"].append(measure(data, options.threads, options.max_memory))
        print(report["jobs"][-1], flush=True)
    finish(report, "scaling", options)


if __name__ == "__main__":
    script(main)
