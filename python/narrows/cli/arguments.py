"""The arguments of the command ``narrows``: flags, their help, and the defaults that a config file gives."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .._version import __version__
from ..backends import AUTO, BACKENDS
from ..data import KINDS
from ..data.bundled import NAMES
from ..data.readers import FORMATS
from ..models import REGISTRY
from ..plan.losses import LOSSES
from ..plan.spec import Precision
from .settings import FitSettings, UsageError, did_you_mean, parse_column, parse_columns, parse_setting, parse_size

__all__ = ["apply_config", "build_parser"]

_SIZES = (2, 4, 8, 16, 32)
_DEFAULTS = {f.name: f.default for f in dataclasses.fields(FitSettings)}


class _Parser(argparse.ArgumentParser):
    """A parser that raises its errors, so that `main` reports them like all others, and that knows misspelt words."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._subparsers is None and args is not None:
            self._check_flags(args)
        parsed, extra = super().parse_known_args(args, namespace)
        if extra:  # here and not in the parser of all commands, so that the error names the help of this one
            self.error(f"unrecognized arguments: {' '.join(extra)}")
        return parsed, extra

    def _check_flags(self, args: Sequence[str]) -> None:
        """Raise for the first unknown flag, before a missing argument that is only a consequence."""
        known = self._option_string_actions
        for arg in args:
            flag = arg.partition("=")[0]
            if arg == "--":
                return
            if flag not in known and (flag.startswith("--") or (flag.startswith("-") and f"-{flag}" in known)):
                self.error(f"unknown flag {flag}{did_you_mean(flag, known)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(str(value), map(str, action.choices or ()))
            raise

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=min(100, shutil.get_terminal_size((100, 24)).columns - 2))


def _integer(low: int, high: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < low or (high is not None and value >= high):
            bound = f"at least {low}" if high is None else f"at least {low} and below {high}"
            raise argparse.ArgumentTypeError(f"{text} must be {bound}")
        return value

    return parse


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must not be negative or infinite")
    return value


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(_integer(1)(part.strip()) for part in text.split(","))


def _widths(text: str) -> tuple[int, ...]:
    return () if text.strip().lower() in ("", "none") else _sizes(text)


def _as_argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser whose ValueError becomes the message of argparse."""

    def wrapped(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return wrapped


def build_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = _Parser(
        prog="narrows",
        description="Train and apply autoencoders for data matrices.",
        epilog="Each command has its own --help. Exit codes: 0 done, 1 unexpected error, 2 wrong usage, 3 bad input or "
        "output, 4 training diverged, 5 the run to resume differs, 6 not enough memory or no such device, 128 + signal "
        "number after a stop with a checkpoint.",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"narrows {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    made: dict[str, argparse.ArgumentParser] = {}

    def command(name: str, summary: str, text: str = "") -> argparse.ArgumentParser:
        made[name] = subparsers.add_parser(
            name,
            help=summary,
            description=text or f"{summary[0].upper()}{summary[1:]}.",
            formatter_class=_Help,
            allow_abbrev=False,
        )
        return made[name]

    _add_fit(command("fit", "train on a data set; write the model, the latent codes and a report", _FIT_TEXT))
    _add_fit(command("sweep", "fit several numbers of components and compare them with PCA", _SWEEP_TEXT), sweep=True)
    for name, summary in (
        ("encode", "write the latent codes of a data set (.npy, .h5ad, .csv)"),
        ("decode", "write the reconstruction of latent codes (.npy, .h5ad, .csv)"),
        ("score", "write the reconstruction loss of each row, lower is better (.csv, .npy)"),
    ):
        _add_apply(command(name, summary), name)
    report = command("report", "write report.html of a finished fit or sweep again")
    report.add_argument("dir", metavar="DIR", help="the --out folder of the fit or sweep")
    _add_common(report)
    info = command("info", "show what a model file or the folder of a run holds")
    info.add_argument("path", metavar="MODEL", help="model.safetensors, or the folder of a fit or sweep")
    info.add_argument("--json", action="store_true", help="print JSON, with every parameter")
    _add_common(info)
    _add_common(command("doctor", "show versions, threads, backends and optional packages"))
    _add_bench(command("bench", "time training steps on this machine and compare them with its peak"))
    return parser, made


_FIT_TEXT = """Train an autoencoder on DATA. The folder --out gets model.safetensors, the latent codes (latent.h5ad or
latent.npy), metrics.json, history.jsonl, report.html, run.log, config.toml, and _SUCCESS as the last file. After an
interruption, repeat the command to resume the run; the result has the same bits."""


_SWEEP_TEXT = """Fit an autoencoder to DATA for each number of components, and compare the losses on held-out rows with
PCA. The folder --out gets a folder for each fit, sweep.json, report.html with the elbow, and _SUCCESS as the last file.
Repeat the command to finish an interrupted sweep; you may add sizes."""


def _add_common(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--quiet", action="store_true", help="show warnings and errors only")
    parser.add_argument("--debug", action="store_true", help="show the full traceback of an error")


def _add_backend(parser: argparse._ActionsContainer, default: str | None, shown: str) -> None:
    parser.add_argument(
        "--backend", choices=("auto", *BACKENDS), default=default, metavar="NAME",
        help=f"what computes: auto, {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]} (default: {shown})",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=_integer(1), metavar="N",
        help="number of threads (default: NARROWS_NUM_THREADS, else SLURM_CPUS_PER_TASK, else every CPU that this "
        "process may use)",
    )  # fmt: skip


def _add_memory(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--max-memory", type=_as_argument(parse_size), metavar="SIZE",
        help="memory limit, such as 8GB; a job that needs more is refused with exit code 6",
    )  # fmt: skip


def _add_input(parser: argparse._ActionsContainer, layer: str, roles: str) -> None:
    kinds = {form.layer: [f.name for f in FORMATS if f.layer == form.layer] for form in FORMATS if form.layer}
    layered = "; ".join(f"{kind} ({', '.join(names)})" for kind, names in kinds.items())
    parser.add_argument("--layer", metavar="NAME", help=f"which matrix to read: {layered}. Default: {layer}")
    parser.add_argument("--genes-by-cells", action="store_true", help="the table is genes x cells: transpose it")
    texts, tables = (", ".join(f.name for f in FORMATS if o in f.takes) for o in ("header", "drop_columns"))
    parser.add_argument(
        "--header", action=argparse.BooleanOptionalAction,
        help=f"whether the first line is a header ({texts}; default: {roles})",
    )  # fmt: skip
    parser.add_argument(
        "--index-column", type=parse_column, metavar="NAME|NUMBER",
        help="column with the row names, by name or by number from 0, or none (tables only; default: the column "
        "without a header, or a first column of text)",
    )  # fmt: skip
    parser.add_argument(
        "--drop-columns", type=_as_argument(parse_columns), metavar="A,B",
        help=f"columns to leave out, by names or by numbers from 0 ({tables})",
    )  # fmt: skip
    parser.add_argument(
        "--modality", metavar="NAME", help="which modality of MuData (.h5mu) to read; default: the only one"
    )
    _add_trust(parser)


def _add_trust(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--follow-links", action="store_true",
        help="read what links inside the file or folder lead to outside of it; without this flag they are an error",
    )  # fmt: skip
    parser.add_argument(
        "--untrusted", action="store_true",
        help="read the file in a child process with a time limit: an altered file may make its C library hang or crash",
    )  # fmt: skip


def _add_apply(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="model.safetensors, or the folder of a fit")
    if name == "decode":
        parser.add_argument("data", metavar="LATENT", help="file of latent codes: .npy, .h5ad or .csv")
        _add_trust(parser)
    else:
        parser.add_argument("data", metavar="DATA", help="data file in any format that fit reads, or a bundled name")
        _add_input(parser, "as in the fit", "as in the fit")
    formats = ".csv or .npy" if name == "score" else ".npy, .h5ad or .csv"
    if name != "encode":
        of = parser.add_mutually_exclusive_group()
        of.add_argument(
            "--batch-key", metavar="NAME",
            help="column of obs with the batch of each row (.h5ad, .zarr; default: as in the fit)",
        )  # fmt: skip
        of.add_argument("--batch", metavar="LABEL", help="one batch for all rows")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="OUT", help=f"file to write: {formats}")
    _add_backend(parser, None, "as in the model")
    _add_memory(parser)
    _add_common(parser)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--cases", metavar="NAME,NAME", help="which of the standard cases (default: all)")
    what.add_argument("--ops", metavar="CASE", help="time each op of the steps of one case (backend cpp only)")
    _add_backend(parser, None, f"each of {', '.join(AUTO)} that this machine can run")
    parser.add_argument(
        "--seconds", type=_seconds, default=20.0, metavar="SEC", help="total time of all timings (default: 20)"
    )
    parser.add_argument("--json", metavar="FILE.json", help="write the figures to this file too")
    _add_common(parser)


def _add_fit(parser: argparse.ArgumentParser, *, sweep: bool = False) -> None:
    def add(group: argparse._ArgumentGroup, flag: str, text: str, **options: Any) -> None:
        default = _DEFAULTS[flag.strip("-").replace("-", "_")]
        shown = f"{default:g}" if isinstance(default, float) else str(default)
        group.add_argument(
            flag, default=default, help=text if default is None else f"{text} (default: {shown})", **options
        )

    parser.add_argument(
        "data",
        nargs="?",
        metavar="DATA",
        help=f"data file or folder ({', '.join(form.name for form in FORMATS)}), or the name of a bundled data set "
        f"({', '.join(NAMES)})",
    )
    parser.add_argument("--out", metavar="DIR", help="output folder: new, empty, or of an earlier run")

    model = parser.add_argument_group("model")
    if sweep:
        model.add_argument(
            "--components", type=_sizes, default=_SIZES, metavar="N,N",
            help=f"numbers of latent components (default: {','.join(map(str, _SIZES))})",
        )  # fmt: skip
    else:
        add(model, "--components", "number of latent components", type=_integer(1), metavar="N")
    add(
        model,
        "--hidden",
        "widths of the encoder's hidden layers, such as 512,128, or none (default: 128; none for linear, sparse, "
        "contractive, conv and rbm; 1000,500,250 for deep)",
        type=_widths,
        metavar="N,N",
    )
    add(model, "--estimator", ", ".join(REGISTRY), choices=tuple(REGISTRY), metavar="NAME")
    add(model, "--loss", f"{', '.join(LOSSES)} (default: mse; for count: nb)", choices=LOSSES, metavar="NAME")
    model.add_argument(
        "--set",
        action="append",
        type=_as_argument(parse_setting),
        metavar="NAME=VALUE",
        help="another parameter of the estimator, such as learning_rate_init=3e-4, activation=gelu or "
        "corruption_level=0.2; repeat the flag for more",
    )

    training = parser.add_argument_group("training")
    add(
        training,
        "--epochs",
        "largest number of epochs; training stops earlier if the held-out loss no longer improves",
        type=_integer(1),
        metavar="N",
    )
    add(training, "--batch-size", "rows per step", type=_integer(1), metavar="N")
    add(
        training,
        "--precision",
        "float32, float64, bfloat16; on a GPU also tf32",
        choices=tuple(precision.name.lower() for precision in Precision),
        metavar="NAME",
    )
    add(training, "--seed", "random seed; the same seed gives the same bits", type=_integer(0, 2**64), metavar="N")

    inputs = parser.add_argument_group("input")
    add(
        inputs,
        "--normalize",
        "scaling of the input: log1p (rows to one total, then log), standard, minmax, none. auto chooses none for a "
        "count loss, minmax for bce, log1p for other losses on counts, else standard",
        choices=KINDS,
        metavar="KIND",
    )
    _add_input(inputs, "X, or Gene Expression", "what the first lines say")
    inputs.add_argument(
        "--batch-key", metavar="NAME",
        help="column of obs (.h5ad, .zarr) with the batch of each row; the decoder gets the batch, so the codes need "
        "not contain it",
    )  # fmt: skip
    inputs.add_argument(
        "--label-key", metavar="NAME",
        help="column of obs with the known class of each row, for the accuracy of neighbours and the figures; training "
        "does not use it",
    )  # fmt: skip

    machine = parser.add_argument_group("machine")
    _add_backend(machine, "auto", "auto")
    _add_memory(machine)
    add(
        machine,
        "--resume",
        "auto resumes an earlier run with the same settings and data; never starts again; require fails if there is no "
        "run to resume",
        choices=("auto", "never", "require"),
        metavar="HOW",
    )
    add(machine, "--checkpoint-minutes", "shortest time between two checkpoints", type=_seconds, metavar="MIN")
    add(
        machine,
        "--walltime-margin",
        "save and stop this many seconds before SLURM_JOB_END_TIME",
        type=_seconds,
        metavar="SEC",
    )

    other = parser.add_argument_group("other")
    other.add_argument(
        "--config",
        metavar="FILE.toml",
        help="file of defaults, by flag names; flags on the command line win",
    )
    other.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    _add_common(other)


def apply_config(parser: argparse.ArgumentParser, values: dict[str, Any], path: str) -> None:
    """Make the values of a config file the parser's defaults. They are checked like typed flags."""
    actions = {action.dest: action for action in parser._actions}
    for name, value in values.items():
        where = f"--config {path}: {name.replace('_', '-')}"
        action = actions[name]
        if name == "set":
            converted: Any = [(key, tuple(item) if isinstance(item, list) else item) for key, item in value.items()]
        elif name == "drop_columns" and isinstance(value, list):
            converted = tuple(map(str, value))
        elif isinstance(action, argparse._StoreTrueAction | argparse.BooleanOptionalAction):
            if not isinstance(value, bool):
                raise UsageError(f"{where} must be true or false, not {value!r}")
            converted = value
        else:
            if name == "index_column" and value is False:
                value = "none"
            if isinstance(value, bool) or not isinstance(value, str | int | float | list):
                raise UsageError(f"{where}: {value!r} must be a text, a number or a list")
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            try:
                converted = text if action.type is None else action.type(text)  # type: ignore[operator]
            except argparse.ArgumentTypeError as error:
                raise UsageError(f"{where}: {error}") from None
            if action.choices is not None and converted not in action.choices:
                raise UsageError(
                    f"{where}: {value!r} is not one of {', '.join(map(str, action.choices))}"
                    + did_you_mean(str(value), map(str, action.choices))
                )
        parser.set_defaults(**{name: converted})
