"""docs/accuracy.md from the stored results.

Promises: the page is a function of `results/ulp.json` and `results/precision.json` alone, and needs no native backend.
"""

from __future__ import annotations

import json
from typing import Any

from bench.pages.benchmarks import RESULTS, ROOT, cpu, table

PAGE = ROOT / "docs" / "accuracy.md"


def functions(report: dict[str, Any]) -> list[str]:
    """Of what `ulp.py` wrote."""
    found = report["functions"]
    isas = [isa for isa in next(iter(found.values()))["ns"] if all(isa in each["ns"] for each in found.values())]
    rows = []
    for name, each in found.items():
        worst, bounds = each["worst"], each["bound"]
        fused = next((isa for isa in worst if isa != "baseline"), None)
        bound = f"{bounds[fused or 'baseline']:g}"
        if fused and bounds.get("baseline", bounds[fused]) != bounds[fused]:
            bound += f", baseline {bounds['baseline']:g}"
        rows.append(
            [
                f"`{name}`",
                each["domain"],
                f"{worst[fused]['ulp']:.3f} at {worst[fused]['x']:.6g}" if fused else "-",
                f"{worst['baseline']['ulp']:.3f}" if "baseline" in worst else "-",
                bound,
                ", ".join(f"{each['ns'][isa]:.3f}" for isa in isas),
            ]
        )
    return [
        "",
        "## Native functions",
        "",
        "The largest error of each function over every float32 in its domain, subnormal numbers and infinities "
        "included, against float64, in ulp: units of the gap between float32 numbers at the true value (2**-149 below "
        "2**-126). `tests/backends/test_vector_math.py` asserts the bound on a sample, and on all with "
        "`pytest -m slow`.",
        "",
        "- AVX2 and AVX-512 give the same bits for every number: an element's result does not depend on the width of "
        "the vector or on its neighbours. The baseline of x86-64 has no fused multiply-add, so its bits may differ.",
        "- NaN gives NaN, but the slopes of `Linear`, `Relu` and `LeakyRelu` are constants, chosen by a comparison. "
        "The limits at infinity are taken: `Gelu` and `Silu` are 0 at minus infinity. The sign of a zero is not "
        "promised.",
        "- Nothing changes the floating-point environment: no flush to zero, no other rounding.",
        "- The slope of `Gelu` and of `Silu` has a root, near which its terms cancel. There, and in the slope of the "
        "cross-entropy for targets between 0 and 1, the ulp is that of the sum of the terms' magnitudes.",
        "- A slope is taken from what is saved for it, the output, and for `Gelu` and `Silu` the pre-activation; its "
        "error is that for the saved number. `normal_quantile` is that of 1/2 + x, `BceSigmoid` the cross-entropy of "
        "logits with target y and its derivative.",
        "",
        f"{report['date']}, {cpu(report)}, narrows {report['narrows']}. Times are nanoseconds for an element in cache, "
        "on one core.",
        "",
        *table(
            ["function", "arguments", "fused, ulp", "baseline, ulp", "bound", f"{', '.join(isas)}: ns"],
            rows,
        ),
    ]


def precision(report: dict[str, Any]) -> list[str]:
    """Of what `precision.py` wrote."""
    cases = report["cases"]
    about = [
        [
            name,
            "-".join(map(str, case["widths"])),
            case["loss"],
            f"{case['rows']}, {case['held_out']}",
            f"{case['epochs']}, {case['seeds']}",
        ]
        for name, case in cases.items()
    ]
    compared = [(name, figure, each) for name, case in cases.items() for figure, each in case["compared"].items()]
    rows = []
    for name, figure, each in compared:
        difference, mean = each["difference"], each["float32"]["mean"]
        percent = (f"{100 * difference[key] / mean:+.3f}" for key in ("mean", "low", "high"))
        rows.append(
            [
                f"{name}, {figure}",
                f"{each['float32']['mean']:.5g} ({each['float32']['sd']:.2g})",
                f"{each['bfloat16']['mean']:.5g} ({each['bfloat16']['sd']:.2g})",
                "{} [{}, {}]".format(*percent),
                f"{100 * each['float32']['sd'] / mean:.3f}",
                "yes" if each["within_noise"] else "no",
            ]
        )
    native = f"bfloat16 {report['bfloat16']}, " if "bfloat16" in report else ""
    return [
        "",
        "## Training in bfloat16",
        "",
        "Pairs of fits on real data, equal but for `precision`: the same seed, so the same first "
        "weights and batches, and as many epochs. Both are judged on rows held out: by the loss of a row, and by the "
        f"share of labels that {report['neighbours']} nearest neighbours of its code, among those of the trained rows, "
        "tell.",
        "",
        f"{report['date']}, {cpu(report)}, {native}narrows {report['narrows']}.",
        "",
        *table(["case", "network", "loss", "rows, held out", "epochs, seeds"], about),
        "",
        "Mean and, in brackets, standard deviation over the seeds. The difference is the mean of bfloat16 less float32 "
        f"over the pairs, with its {report['confidence']:.0%} confidence interval. bfloat16 is within noise where the "
        "whole interval is nearer to zero than float32's standard deviation, the last column but one. %: of float32's "
        "mean.",
        "",
        *table(["", "float32", "bfloat16", "difference, %", "seed's SD, %", "within noise"], rows),
    ]


def current() -> str:
    """The page of what is stored now."""
    lines = [
        "# Accuracy",
        "",
        "Written by `bench/accuracy/ulp.py` and `bench/accuracy/precision.py` from `bench/results/`; do not edit.",
    ]
    for name, section in (("ulp.json", functions), ("precision.json", precision)):
        path = RESULTS / name
        if path.exists():
            lines += section(json.loads(path.read_text(encoding="utf-8")))
    return "\n".join(lines) + "\n"


def write() -> None:
    """Write the page anew."""
    PAGE.write_text(current(), encoding="utf-8")
