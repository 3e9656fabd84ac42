"""docs/benchmarks.md from the results of `bench/peers.py`, `bench/counts.py` and `bench/speed/`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bench.pages.tables import Part, number, section
from bench.support.results import Report, reports

LABELS = {
    "pytorch": "PyTorch {torch} eager",
    "pytorch-compile": "torch.compile",
    "jax": "JAX {jax} jit",
    "keras": "Keras {keras}, TensorFlow {tensorflow}",
    "numpy": "NumPy {numpy}",
    "narrows-numba": "narrows on Numba",
}


def floor_ms(case: Report) -> float:
    """Milliseconds of a step's matrix products at the measured peak; bfloat16 has twice that peak."""
    peak: float = case["probe"]["fma_gflops"] * (2 if case["precision"] == "bfloat16" else 1)
    return float(case["gflop"] / peak * 1e3)


def share_of_peak(case: Report) -> float:
    return float(floor_ms(case) / case["contenders"]["narrows"]["median"])


def quartiles(found: Report, scale: float = 1.0) -> str:
    """Median and, in brackets, the quartiles."""
    median, q1, q3 = (number(scale * found[key]) for key in ("median", "q1", "q3"))
    return f"{median} [{q1}, {q3}]"


def fastest(case: Report) -> list[str]:
    """Ratios to the fastest other library: among its usual ways, and among all ways."""
    names = (("usual_ratio", "usual_fastest"), ("ratio", "fastest"))
    return [f"{case[ratio][case[other]]['median']:.2f}x" if case[other] else "" for ratio, other in names]


def others(report: Report) -> dict[str, str]:
    """The libraries that narrows was compared with, and their column heads."""
    found = {name for case in report["cases"].values() for name in case["ratio"]}
    return {name: label.format(**report["versions"]) for name, label in LABELS.items() if name in found}


def overview(report: Report) -> Part:
    text = [
        "Milliseconds of one training step of narrows, and how many times as long the fastest other library takes. The "
        "first factor is among usual ways to train: one call for each step, or the library's own `fit`. The second is "
        "among all ways."
    ]
    rows = [
        [name, f"{case['target']:g}x", number(case["contenders"]["narrows"]["median"]), ", ".join(fastest(case))]
        for name, case in report["cases"].items()
    ]
    return Part(text, ["case", "target", "ms", "usual ways, all ways"], rows, keys=2)


def steps(report: Report) -> Part:
    columns, rows = others(report), []
    for name, case in report["cases"].items():
        share = f", {share_of_peak(case):.0%}" if case["probe"] else ""
        cells = [quartiles(case["contenders"]["narrows"]) + share]
        for other in columns:
            found = case["contenders"].get(other)
            cells.append(f"{number(found['median'])}, {case['ratio'][other]['median']:.2f}x" if found else "")
        rows.append([name, *cells])
    text = [
        "Each library runs in its own process, with as many CPUs as threads. The processes take turns. All libraries "
        "train the same network from the same weights, on the same batches in the same order, with Adam and with data "
        "in memory. The losses of each library are checked against a float64 reference.",
        "",
        "Milliseconds of one step. narrows: the median over the rounds, the quartiles in brackets, and the share of "
        "the multiply-add peak. Other libraries: the median, and how many times as long as narrows they take (the "
        "median of the ratios of each round). If a library has several ways to train, the fastest one counts. It may "
        "be one compiled call for a whole epoch of prepared batches.",
    ]
    backend = report["backend"]
    after = [f"Backend {backend['name']} ({backend['reason']})."]
    if report["missing"]:
        after.append(f"Not installed: {', '.join(report['missing'])}.")
    overall = report["overall"]
    if mean := overall["geometric_mean"]:
        after.append(
            f"Geometric mean of the ratios to the fastest library, over {overall['cases']} of {overall['of']} dense "
            f"networks: {overall['usual_geometric_mean']:.2f}x among usual ways, {mean:.2f}x among all; target "
            f"{overall['target']:g}x."
        )
    return Part(text, ["case", "narrows", *columns.values()], rows, after=["", " ".join(after)])


def cases(report: Report) -> Part:
    rows = []
    for name, case in report["cases"].items():
        probe = case["probe"]
        rows.append(
            [
                name,
                "-".join(map(str, case["widths"])),
                f"{case['batch']}, {case['loss']}, {case['precision']}",
                number(case["gflop"]),
                number(floor_ms(case)) if probe else "",
                *(number(probe[key]) if probe else "" for key in ("fma_gflops", "exchange_gb_s", "barrier_us")),
                f"{case['date']}, {case['rounds']}",
            ]
        )
    text = [
        "The probe measures the machine in each round. GFLOP/s are of multiply-adds in registers. GB/s are of reads of "
        "memory that another thread has just written. us are of one barrier of all threads. The floor is the time of "
        "the matrix products at the multiply-add peak; bfloat16 has twice that peak."
    ]
    head = ["case", "layers", "batch, loss, precision", "GFLOP", "floor ms", "GFLOP/s", "GB/s", "us", "date, rounds"]
    return Part(text, head, rows, keys=3)


def ways(report: Report) -> Part:
    rows = [
        [name, other, *("; ".join(f"{way}: {number(ms)}" for way, ms in found["tried"].items()), found["variant"])]
        for name, case in report["cases"].items()
        for other, found in case["contenders"].items()
        if len(found["tried"]) > 1
    ]
    text = [
        "If a library has several ways to train, the fastest one counts in each case. Milliseconds of a step, measured "
        "before the rounds: the median of three runs."
    ]
    return Part(text, ["case", "library", "ways", "fastest"], rows, keys=2)


def fits(report: Report) -> Part:
    found = {name: case["fit"] for name, case in report["cases"].items() if "fit" in case}
    rows = [
        [
            name,
            f"{fit['rows']}, {fit['epochs']}",
            number(fit["fit_ms"]),
            number(fit["step_ms"]),
            f"{fit['share']:.0%}",
        ]
        for name, fit in found.items()
    ]
    text = [
        "Milliseconds of a step inside `narrows.Autoencoder.fit`, and of the compiled plan alone on the same rows. The "
        "fit is timed from the checks of X to the fitted estimator. It shuffles rows and holds none out."
    ]
    return Part(text, ["case", "rows, epochs", "fit", "plan alone", "share"], rows)


def memory(report: Report) -> Part:
    libraries = report["memory"].get("libraries", {})
    rows = [
        [name, *(f"{value:.0f}" for value in (found["before"], found["peak"], found["peak"] - found["before"]))]
        for name, found in libraries.items()
    ]
    data = max((found["data"] for found in libraries.values()), default=0)
    text = [
        f"MiB of a fresh process that fits the network of `hinton` for two epochs on {data:.0f} MiB of data. `before`: "
        "with the library and the data loaded."
    ]
    return Part(text, ["library", "before", "peak", "difference"], rows)


def layers(report: Report) -> Part:
    columns = list(dict.fromkeys((layer["what"], layer["activation"]) for layer in report["layers"]))
    found: dict[tuple[int, ...], dict[tuple[str, str], str]] = {}
    for layer in report["layers"]:
        cell = f"{number(layer['ms']['narrows']['median'])}, {layer['ratio']['median']:.2f}x"
        found.setdefault(tuple(layer["shape"]), {})[layer["what"], layer["activation"]] = cell
    rows = [
        ["x".join(map(str, shape)), *(cells.get(column, "") for column in columns)] for shape, cells in found.items()
    ]
    summaries = [
        f"{what.capitalize()}: geometric mean {s['geometric_mean']:.2f}x, worst {s['worst']:.2f}x "
        f"({s['worst_at'][0]}, {'x'.join(map(str, s['worst_at'][1]))})."
        for what, s in report["summary"].items()
    ]
    text = [
        "`narrows.functional.dense` and `dense_backward` beside PyTorch's operators. A shape is rows x inputs x "
        "outputs. Cells have milliseconds of narrows, and how many times as long PyTorch takes."
    ]
    head = ["shape", *(f"{what}, {activation}" for what, activation in columns)]
    return Part(text, head, rows, after=["", " ".join(summaries)])


def counts(report: Report) -> Part:
    rows = []
    for case, found in report["ms"].items():
        for name, one in found.items():
            target = report["targets"]["ratio"][case].get(name)
            rows.append(
                [
                    case,
                    name,
                    "" if target is None else f"{target:g}x",
                    quartiles(one),
                    "" if name == "narrows" else f"{one['ratio']:.1f}x",
                    f"{one['step_mib']:.0f}",
                    f"{one['peak_mib']:.0f}",
                ]
            )
    text = [
        "Adam on 512 (or 2048) cells of 20000 genes, 7 % of the counts not zero, 20000-128-32-128-20000. The decoder "
        "is negative binomial (`genomics-nb`) or zero-inflated (`genomics-zinb`), in the form of scVI; `genomics-mse` "
        "has squared error on the normalised logarithms. Milliseconds, and how many times as long as narrows. `steps "
        "add`: MiB that steps add to a process with library and data. `data and steps`: MiB that both add. PyTorch "
        "reads dense rows that were made beforehand."
    ]
    head = ["case", "library", "target", "ms", "ratio", "steps add", "data and steps"]
    return Part(text, head, rows, keys=3)


def cells(report: Report) -> Part:
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
    text = [
        "Real counts. One hidden layer of 128 units, 32 latents, negative binomial counts, batches of 128 cells, a "
        "dropout of 0.1. Models are trained on nine tenths of the cells. scvi-tools also has batch normalisation, its "
        "default.",
        "",
        "- `ms`: milliseconds of an epoch of the whole fit. `ratio`: how many times as long as narrows' "
        "`CountAutoencoder` (`narrows`).",
        "- `MiB`: what the fit added to its process. `narrows fit` is the whole job on the command line, with early "
        "stopping, from the file to the report. Its `MiB` is all memory of the process.",
        "- `given code`, `marginal`: minus the log-likelihood of the held-out cells, in nats for a cell. The first is "
        "given the cell's own code. The second, for variational models, is by importance sampling with 100 draws.",
        "- `15-NN`: share of cells whose label their 15 nearest neighbours among all codes predict.",
    ]
    head = ["data", "model", "epochs", "ms", "ratio", "MiB", "given code", "marginal", "15-NN"]
    return Part(text, head, rows, keys=2)


def scaling(report: Report) -> Part:
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
    text = [
        f"`narrows fit --estimator count --loss nb --epochs 1 --max-memory {report['max_memory']}` on synthetic .h5ad "
        f"files of {report['genes']} genes (`bench/data/synthetic.py`): 128 hidden units, 32 latents, batches of 512. "
        "`epoch` includes its validation. `job` is the whole command, with codes, baseline and report. `encode` is "
        "`narrows encode`. `peak` is the memory of the job."
    ]
    head = ["cells", "file, MB", "epoch, s", "us a cell", "job, s", "encode, s", "peak, GB"]
    return Part(text, head, rows, keys=2)


def gpu_steps(report: Report) -> Part:
    columns, rows = others(report), []
    for name, case in report["cases"].items():
        line = [quartiles(case["contenders"]["narrows"], 1e3)]
        for other in columns:
            found = case["contenders"].get(other)
            ratio = f", {case['ratio'][other]['median']:.2f}x ({found['variant']})" if found else ""
            line.append(f"{number(1e3 * found['median'])}{ratio}" if found else "")
        rows.append([name, case["precision"], f"{case['target']:g}x", *line, f"{case['date']}, {case['rounds']}"])
    text = [
        "Microseconds of a training step: the median over the rounds and the quartiles. For other libraries, how many "
        "times as long they take, in the fastest of the ways tried. Data are on the GPU. float32 products are in "
        "float32 in every library."
    ]
    head = ["case", "precision", "target", "narrows", *columns.values(), "date, rounds"]
    return Part(text, head, rows, keys=3)


def gpu_counts(report: Report) -> Part:
    rows = [
        [case, name, quartiles(found, 1e3), f"{found['ratio']:.2f}x", f"{found['peak_mib']:.0f}"]
        for case, libraries in report["ms"].items()
        for name, found in libraries.items()
    ]
    text = ["Microseconds, the ratio to narrows, and MiB of the GPU's memory including the data."]
    return Part(text, ["case", "library", "us", "ratio", "MiB"], rows, keys=2)


def busy(report: Report) -> Part:
    libraries = list(dict.fromkeys(name for case in report["cases"].values() for one in case.values() for name in one))
    rows = []
    for case, counts in report["cases"].items():
        for count, found in counts.items():
            cells = []
            for name in libraries:
                one = found.get(name)
                ms = [number(one[team]["median"]) for team in ("one", "team")] if one else []
                cells.append(f"{ms[0]}, {ms[1]}, {one['team']['ratio']:.2f}x" if one else "")
            rows.append([case, count, *cells])
    text = [
        f"Other processes compute without end on the CPUs of the {report['threads']} threads. Cells have milliseconds "
        f"of a step with one thread and with {report['threads']} threads, and the median of the ratios of each round. "
        "A ratio above 1 means that more threads take longer than one."
    ]
    return Part(text, ["case", "busy processes", *libraries], rows, keys=2)


SECTIONS: tuple[tuple[str, str, Callable[[Report], Part]], ...] = (
    ("## Overview", "peers", overview),
    ("## Training steps", "peers", steps),
    ("### Cases and state of the machine", "peers", cases),
    ("### Ways to train", "peers", ways),
    ("## Whole fits", "peers", fits),
    ("## Memory of a fit", "peers", memory),
    ("## Busy machines", "busy", busy),
    ("## Single layers", "layers", layers),
    ("## Steps on counts", "counts", counts),
    ("## Models of cells", "cells", cells),
    ("## Batch jobs of growing size", "scaling", scaling),
)
"""The page from top to bottom: title, experiment, and the function that writes the section."""


def render(results: Path) -> str:
    lines = [
        "# Benchmarks",
        "",
        "`python bench/pages` writes this page from the results of `bench/peers.py`, `bench/counts.py` and "
        "`bench/speed/`. Do not edit it. Compare figures of one machine and one run only: a ratio compares runs that "
        "took turns, but milliseconds change with the state of the machine.",
    ]
    for title, name, part in SECTIONS:
        lines += section(title, reports(name, results), part)
    steps_on_gpu, counts_on_gpu = (reports(name, results, gpu=True) for name in ("peers", "counts"))
    if not (steps_on_gpu or counts_on_gpu):
        lines += ["", "## On a GPU", "", "There are no stored results of a GPU yet."]
    lines += section("## Training steps on a GPU", steps_on_gpu, gpu_steps)
    lines += section("## Steps on counts on a GPU", counts_on_gpu, gpu_counts)
    return "\n".join(lines) + "\n"
