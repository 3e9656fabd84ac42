"""docs/benchmarks.md from the stored results.

Promises: the page is a function of `results/*.json` alone, and needs none of the libraries that were timed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
LABELS = {
    "pytorch": "PyTorch {torch} eager",
    "pytorch-compile": "torch.compile",
    "jax": "JAX {jax} jit",
    "keras": "Keras {keras}, TensorFlow {tensorflow}",
    "narrows-numba": "narrows on Numba",
}


def floor_ms(case: dict[str, Any]) -> float:
    """Of a step's matrix products at the multiply-add peak probed beside it; in bfloat16 at twice that."""
    peak: float = case["probe"]["fma_gflops"] * (2 if case["precision"] == "bfloat16" else 1)
    return case["gflop"] / peak * 1e3  # type: ignore[no-any-return]


def share_of_peak(case: dict[str, Any]) -> float:
    return floor_ms(case) / case["contenders"]["narrows"]["median"]  # type: ignore[no-any-return]


def table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def render(
    report: dict[str, Any],
    layers: dict[str, Any] | None,
    counts: Any = None,
    cells: Any = None,
    scaling: Any = None,
    gpu: Any = None,
    gpu_counts: Any = None,
) -> str:
    """The page.

    Parameters
    ----------
    report : dict
        What `peers.py` wrote.
    layers, counts, cells, scaling : dict, optional
        What `layers.py`, `counts.py`, `cells.py` and `scaling.py` wrote.
    gpu, gpu_counts : dict, optional
        What `peers.py` and `counts.py` wrote on a GPU.
    """
    lines = [
        "# Benchmarks",
        "",
        "Written by `bench/peers.py`, `layers.py`, `counts.py`, `cells.py` and `scaling.py` from `bench/results/`; do "
        "not edit.",
        "",
        f"{_machine(report)}, backend {report['backend']['name']} ({report['backend']['reason']}), narrows "
        f"{report['narrows']}. Every library runs in a process of its own, on as many CPUs as threads, and they take "
        "turns. All train the same network from the same weights on the same batches, in order, with Adam, data in "
        "memory; the losses of each are checked against a float64 reference.",
        *(f"\n{name} is left out: it is not installed." for name in report["missing"]),
        *_steps(report),
        *_variants(report),
        *_fits(report),
        *_memory(report),
        *(_layers(layers) if layers else []),
        *(_counts(counts) if counts else []),
        *(_cells(cells) if cells else []),
        *(_scaling(scaling) if scaling else []),
        *_gpu(gpu, gpu_counts),
    ]
    return "\n".join(lines) + "\n"


def cpu(report: dict[str, Any]) -> str:
    fields = report["machine"]["cpu"]
    name, family, model = (fields.get(key, "?") for key in ("model name", "cpu family", "model"))
    return f"{name} (family {family}, model {model})"


def _machine(report: dict[str, Any]) -> str:
    return f"{cpu(report)}, {report['threads']} threads"


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _steps(report: dict[str, Any]) -> list[str]:
    cases = report["cases"]
    others = [name for name in LABELS if any(name in case["ratio"] for case in cases.values())]
    labels = [LABELS[name].format(**report["versions"]) for name in others]
    about, rows = [], []
    for name, case in cases.items():
        own, probe = case["contenders"]["narrows"], case["probe"]
        floor, share = (_number(floor_ms(case)), f", {share_of_peak(case):.0%}") if probe else ("", "")
        about.append(
            [
                name,
                "-".join(map(str, case["widths"])),
                f"{case['batch']}, {case['loss']}, {case['precision']}",
                _number(case["gflop"]),
                floor,
                *(_number(probe[key]) if probe else "" for key in ("fma_gflops", "exchange_gb_s", "barrier_us")),
                f"{case['date']}, {case['rounds']}",
            ]
        )
        cells = [f"{_number(own['median'])} [{_number(own['q1'])}, {_number(own['q3'])}]{share}"]
        for other in others:
            found = case["contenders"].get(other)
            cells.append(f"{_number(found['median'])}, {case['ratio'][other]['median']:.2f}x" if found else "")
        fastest = [
            f"{case[ratio][case[other]]['median']:.2f}x" if case[other] else ""
            for ratio, other in (("usual_ratio", "usual_fastest"), ("ratio", "fastest"))
        ]
        rows.append([name, *cells, *fastest, f"{case['target']:g}x"])
    overall = report["overall"]
    mean = overall["geometric_mean"]
    return [
        "",
        "## Training steps",
        "",
        "Milliseconds of one step: median over the rounds, in brackets the quartiles, then the share of the "
        "multiply-add peak that narrows reaches; for the others how many times as long as narrows they take (the "
        "median of the ratios of each round). Of a library's ways to train, the fastest counts, even if it is a whole "
        "epoch of prepared batches in one compiled call. The last columns are the ratios to the fastest other library: "
        "to its usual ways (a call for each step, or its own `fit`), of which the targets were set, and to any.",
        "",
        *table(["case", "narrows", *labels, "to usual ways", "to any way", "target"], rows),
        "",
        *(
            [
                f"Geometric mean of the ratios to the fastest, {overall['cases']} of {overall['of']} dense networks: "
                f"{overall['usual_geometric_mean']:.2f}x to usual ways, {mean:.2f}x to any; target "
                f"{overall['target']:g}x.",
                "",
            ]
            if mean
            else []
        ),
        "The cases, and the state of the machine, probed in each round: multiply-adds in registers, what a thread "
        "reads of memory that another has just written, and all threads meeting once. The floor is the time of the "
        "matrix products at that peak (in bfloat16 at twice that).",
        "",
        *table(
            ["case", "layers", "batch, loss, precision", "GFLOP", "floor ms", "GFLOP/s", "GB/s", "us", "date, rounds"],
            about,
        ),
    ]


def _variants(report: dict[str, Any]) -> list[str]:
    rows = [
        [name, other, *("; ".join(f"{way}: {_number(ms)}" for way, ms in found["tried"].items()), found["variant"])]
        for name, case in report["cases"].items()
        for other, found in case["contenders"].items()
        if len(found["tried"]) > 1
    ]
    return [
        "",
        "### Ways tried",
        "",
        "Where a library has several ways to train, the fastest counts, case by case. Milliseconds of a step before "
        "the rounds, median of three runs.",
        "",
        *table(["case", "library", "ways", "taken"], rows),
    ]


def _fits(report: dict[str, Any]) -> list[str]:
    fits = {name: case["fit"] for name, case in report["cases"].items() if "fit" in case}
    rows = [
        [
            name,
            _number(fit["fit_ms"]),
            _number(fit["step_ms"]),
            f"{fit['share']:.0%}",
            f"{fit['rows']}, {fit['epochs']}",
        ]
        for name, fit in fits.items()
    ]
    return [
        "",
        "## Whole fits",
        "",
        "Milliseconds of a step in `narrows.Autoencoder.fit` (all of it, from the checks of X to the fitted "
        "estimator; shuffled, nothing held out) and of the compiled plan alone on the same rows.",
        "",
        *table(["case", "fit", "plan alone", "share", "rows, epochs"], rows),
    ]


def _memory(report: dict[str, Any]) -> list[str]:
    memory = report["memory"]
    if not memory:
        return []
    rows = [
        [name, *(f"{value:.0f}" for value in (found["before"], found["peak"], found["peak"] - found["before"]))]
        for name, found in memory["libraries"].items()
    ]
    data = next(iter(memory["libraries"].values()))["data"]
    return [
        "",
        "## Memory of a fit",
        "",
        f"MiB of a fresh process that fits the network of `hinton` for two epochs on {data:.0f} MiB of data: with the "
        "library and the data in it, at most, and the difference.",
        "",
        *table(["library", "before", "peak", "difference"], rows),
    ]


def _layers(report: dict[str, Any]) -> list[str]:
    columns = list(dict.fromkeys((layer["what"], layer["activation"]) for layer in report["layers"]))
    found: dict[tuple[int, ...], dict[tuple[str, str], str]] = {}
    for layer in report["layers"]:
        cell = f"{_number(layer['ms']['narrows']['median'])}, {layer['ratio']['median']:.2f}x"
        found.setdefault(tuple(layer["shape"]), {})[layer["what"], layer["activation"]] = cell
    rows = [
        ["x".join(map(str, shape)), *(cells.get(column, "") for column in columns)] for shape, cells in found.items()
    ]
    summaries = [
        f"{what}: geometric mean {s['geometric_mean']:.2f}x, worst {s['worst']:.2f}x "
        f"({s['worst_at'][0]}, {'x'.join(map(str, s['worst_at'][1]))})"
        for what, s in report["summary"].items()
    ]
    return [
        "",
        "## Single layers",
        "",
        f"`narrows.functional.dense` and `dense_backward` beside the operators of PyTorch {report['torch']}; "
        f"{report['date']}, {_machine(report)}, {report['rounds']} rounds. Rows x inputs x outputs: milliseconds of "
        "narrows, and how many times as long PyTorch takes.",
        "",
        *table(["shape", *(f"{what}, {activation}" for what, activation in columns)], rows),
        "",
        "; ".join(summaries).capitalize() + ".",
    ]


def _counts(report: dict[str, Any]) -> list[str]:
    rows = []
    for case, found in report["ms"].items():
        own = found["narrows"]
        for name, one in found.items():
            target = report["targets"]["ratio"][case].get(name)
            rows.append(
                [
                    case,
                    name,
                    f"{_number(one['median'])} [{_number(one['q1'])}, {_number(one['q3'])}]",
                    "" if one is own else f"{one['ratio']:.1f}x",
                    "" if target is None else f"{target:g}x",
                    f"{one['step_mib']:.0f}",
                    f"{one['peak_mib']:.0f}",
                ]
            )
    return [
        "",
        "## Steps on counts",
        "",
        "Adam on 512 (or 2048) cells of 20000 genes, 7 % not zero, 20000-128-32-128-20000 with a negative binomial "
        "decoder (`genomics-nb`) or a zero-inflated one, in the form of scVI, or with squared error on the normalised "
        "logarithms. Milliseconds, how many times as long as narrows, "
        "MiB that steps add to the process that holds library and data, and MiB that data and steps add together; "
        f"PyTorch {report['torch']} is given dense rows made beforehand. {report['date']}, {_machine(report)}, "
        f"{report['rounds']} rounds.",
        "",
        *table(["case", "library", "ms", "ratio", "target", "steps add", "data and steps"], rows),
    ]


def _cells(report: dict[str, Any]) -> list[str]:
    def shown(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    rows = []
    for data, models in report["sets"].items():
        own = models.get("narrows", {}).get("epoch_seconds")
        for name, one in models.items():
            epoch = one["epoch_seconds"]
            rows.append(
                [
                    f"{data} ({one['cells']} x {one['genes']})",
                    name,
                    "" if epoch is None else str(one["epochs"]),
                    "" if epoch is None else f"{epoch * 1e3:.0f}",
                    "" if epoch is None or own is None or name == "narrows" else f"{epoch / own:.1f}x",
                    f"{one['added_mib']:.0f}",
                    shown(one["given_code"], 1),
                    shown(one["marginal"], 1),
                    shown(one["knn_accuracy"], 3),
                ]
            )
    one = next(iter(next(iter(report["sets"].values())).values()))
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return [
        "",
        "## Models of cells",
        "",
        "Real counts: one hidden layer of 128 units, 32 latents, negative binomial counts, batches of 128 cells, "
        "trained on nine tenths of the cells, a dropout of 0.1. Milliseconds of an epoch of the whole fit, how many "
        "times as long as narrows' `CountAutoencoder` (`narrows`), MiB that the fit added to its process (`narrows "
        "fit`: the whole job on the command line, which stops by itself, from the file to the report, and all the "
        "memory of its process). Of the other cells minus the log-likelihood in nats, given their own code and, of "
        "variational models, by importance sampling with 100 draws; share of cells whose label their 15 nearest "
        f"neighbours among all codes tell. scvi-tools has batch normalisation besides, its default. {one['date']}, "
        f"{_machine(report)}, {versions}.",
        "",
        *table(["data", "model", "epochs", "ms each", "ratio", "MiB", "given code", "marginal", "15-NN"], rows),
    ]


def _scaling(report: dict[str, Any]) -> list[str]:
    rows = [
        [
            str(job["cells"]),
            f"{job['file_mb']:.0f}",
            f"{job['epoch_s']:.2f}",
            f"{job['epoch_us_per_cell']:.0f}",
            f"{job['wall_s']:.1f}",
            f"{job['encode_s']:.1f}",
            f"{job['peak_rss_gb']:.2f}",
        ]
        for job in report["jobs"]
    ]
    return [
        "",
        "## Jobs on more and more cells",
        "",
        f"`narrows fit --estimator count --loss nb --epochs 1 --max-memory {report['max_memory']}` on synthetic .h5ad "
        f"files of {report['genes']} genes (`bench/data/synthetic.py`), 128 hidden units, 32 latents, batches of 512: "
        "seconds of the epoch with its validation, microseconds of it for a cell, seconds of the whole job (codes, "
        "baseline and report included) and of `narrows encode`, GB of the job's peak. "
        f"{report['date']}, {_machine(report)}.",
        "",
        *table(["cells", "file, MB", "epoch, s", "us a cell", "job, s", "encode, s", "peak, GB"], rows),
    ]


def _gpu(report: dict[str, Any] | None, counts: dict[str, Any] | None) -> list[str]:
    lines = ["", "## On a GPU", ""]
    if report is None and counts is None:
        return [*lines, "Not yet measured: the CUDA backend has run on no GPU."]
    if report is not None:
        cases = report["cases"]
        others = [name for name in LABELS if any(name in case["ratio"] for case in cases.values())]
        rows = []
        for name, case in cases.items():
            own = case["contenders"]["narrows"]
            cells = [f"{_number(1e3 * own['median'])} [{_number(1e3 * own['q1'])}, {_number(1e3 * own['q3'])}]"]
            for other in others:
                found = case["contenders"].get(other)
                ratio = f", {case['ratio'][other]['median']:.2f}x ({found['variant']})" if found else ""
                cells.append(f"{_number(1e3 * found['median'])}{ratio}" if found else "")
            rows.append([name, case["precision"], *cells, f"{case['target']:g}x", f"{case['date']}, {case['rounds']}"])
        lines += [
            f"{report['backend']['reason']}, beside {cpu(report)}. Microseconds of a training step: median over the "
            "rounds and quartiles, then how many times as long the others take, in the fastest of the ways tried. "
            "Data lie on the GPU; float32 products are float32's in every library.",
            "",
            *table(
                ["case", "precision", "narrows", *(LABELS[o].format(**report["versions"]) for o in others),
                 "target", "date, rounds"],
                rows,
            ),
        ]  # fmt: skip
    if counts is not None:
        rows = [
            [case, name, *(_number(1e3 * found[key]) for key in ("median", "q1", "q3")), f"{found['ratio']:.2f}x",
             f"{found['peak_mib']:.0f}"]
            for case, libraries in counts["ms"].items()
            for name, found in libraries.items()
        ]  # fmt: skip
        lines += [
            "",
            f"Steps on counts ({counts['backend']}, PyTorch {counts['torch']}, {counts['date']}, {counts['rounds']} "
            "rounds): microseconds, the ratio to narrows, and MiB of the GPU's memory with the data.",
            "",
            *table(["case", "library", "median", "q1", "q3", "ratio", "MiB"], rows),
        ]
    return lines


def current() -> str:
    """The page of what is stored now."""

    def stored(name: str) -> Any:
        path = RESULTS / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    names = ("peers", "layers", "counts", "cells", "scaling", "peers-cuda", "counts-cuda")
    return render(*(stored(f"{name}.json") for name in names))


def write() -> None:
    """Write the page anew."""
    PAGE.write_text(current(), encoding="utf-8")
