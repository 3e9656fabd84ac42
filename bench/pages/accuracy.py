"""docs/accuracy.md from the results of `bench/accuracy/ulp.py` and `precision.py`."""

from __future__ import annotations

from pathlib import Path

from bench.pages.tables import Part, section
from bench.support.results import Report, reports

ABOUT_FUNCTIONS = [
    "The largest error of each function over every float32 in its domain, including subnormal numbers and infinities. "
    "The reference is float64. The unit is the ulp: the gap between float32 numbers at the true value (2**-149 below "
    "2**-126). `tests/backends/test_vector_math.py` asserts the bound on a sample of the numbers, and on all of them "
    "with `pytest -m slow`. Times are nanoseconds for an element in cache, on one core.",
    "",
    "- AVX2 and AVX-512 give the same bits for every number. An element's result does not depend on the width of the "
    "vector or on its neighbours. Baseline x86-64 has no fused multiply-add, so its bits may differ.",
    "- NaN gives NaN, except in the slopes of `Linear`, `Relu` and `LeakyRelu`: these are constants that a comparison "
    "selects. Infinities give the limits: `Gelu` and `Silu` are 0 at minus infinity. The sign of a zero is not "
    "promised.",
    "- Nothing changes the floating-point environment: no flush to zero and no other rounding mode.",
    "- The slopes of `Gelu` and `Silu` have a root, where their terms cancel. There the ulp is that of the sum of the "
    "terms' magnitudes. The same holds for the slope of the cross-entropy at targets between 0 and 1.",
    "- A slope is computed from saved numbers: the output, and for `Gelu` and `Silu` the pre-activation. Its error is "
    "the error at the saved number. `normal_quantile` is the quantile at 1/2 + x. `BceSigmoid` is the cross-entropy of "
    "logits with target y, and its derivative.",
]


def functions(report: Report) -> Part:
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
                bound,
                f"{worst[fused]['ulp']:.3f} at {worst[fused]['x']:.6g}" if fused else "-",
                f"{worst['baseline']['ulp']:.3f}" if "baseline" in worst else "-",
                ", ".join(f"{each['ns'][isa]:.3f}" for isa in isas),
            ]
        )
    head = ["function", "arguments", "bound, ulp", "fused, ulp", "baseline, ulp", f"ns: {', '.join(isas)}"]
    return Part(ABOUT_FUNCTIONS, head, rows, keys=3)


def precision(report: Report) -> Part:
    rows = []
    for name, case in report["cases"].items():
        for figure, each in case["compared"].items():
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
    text = [
        "Pairs of fits on real data that differ only in `precision`. Both fits of a pair have the same seed, so the "
        "same first weights and batches, and the same number of epochs. Rows held out give two figures. One is the "
        f"loss of a row. The other is the share of rows whose label the {report['neighbours']} nearest neighbours of "
        "its code predict. The neighbours are training rows.",
        "",
        "Each cell has the mean over the seeds and, in brackets, the standard deviation. The difference is bfloat16 "
        f"minus float32, the mean over the pairs with its {report['confidence']:.0%} confidence interval. Percentages "
        "are of float32's mean. bfloat16 is within noise if the whole interval is closer to zero than float32's "
        "standard deviation (column `SD of seeds`).",
    ]
    return Part(text, ["", "float32", "bfloat16", "difference, %", "SD of seeds, %", "within noise"], rows)


def networks(report: Report) -> Part:
    rows = [
        [
            name,
            "-".join(map(str, case["widths"])),
            case["loss"],
            f"{case['rows']}, {case['held_out']}",
            f"{case['epochs']}, {case['seeds']}",
        ]
        for name, case in report["cases"].items()
    ]
    head = ["case", "network", "loss", "rows, held out", "epochs, seeds"]
    native = [f"bfloat16 arithmetic is {report['bfloat16']} on this machine."] if "bfloat16" in report else []
    return Part(native, head, rows)


def render(results: Path) -> str:
    lines = [
        "# Accuracy",
        "",
        "`python bench/pages` writes this page from the results of `bench/accuracy/ulp.py` and `precision.py`. Do not "
        "edit it.",
        *section("## Native functions", reports("ulp", results), functions),
        *section("## Training in bfloat16", reports("precision", results), precision),
        *section("### Networks trained in bfloat16", reports("precision", results), networks),
    ]
    return "\n".join(lines) + "\n"
