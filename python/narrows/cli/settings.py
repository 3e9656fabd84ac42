"""The settings of a fit: defaults, config files, and the comparison of two runs.

- A setting has one name: the flag ``--batch-size``, the key ``batch-size`` of a config file, the field `batch_size`.
- A config file gives defaults and flags win. An unknown key or a wrong value is a `UsageError`.
- Nothing here reads data or imports an optional package.
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import difflib
import math
import os
import re
import tomllib
import urllib.parse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..plan.losses import LOSSES

__all__ = [
    "READING",
    "FitSettings",
    "UsageError",
    "did_you_mean",
    "in_flags",
    "parse_size",
    "read_config",
    "read_toml",
    "show_size",
    "storable",
]

#: Parameters of estimators that have a flag of their own, by the field of `FitSettings`.
_PARAMETERS = {
    "components": "n_components",
    "hidden": "hidden_layer_sizes",
    "loss": "loss",
    "epochs": "max_iter",
    "batch_size": "batch_size",
    "precision": "precision",
    "backend": "backend",
    "threads": "n_threads",
    "seed": "random_state",
}
#: Flags of reading, which `narrows.data.open` takes by these names. --layer may come from the fit.
READING = ("genes_by_cells", "modality", "follow_links", "untrusted", "header", "index_column", "drop_columns")
#: All parameters of the library that have a flag, by the name that its messages use.
_FLAG_OF = {parameter: field for field, parameter in _PARAMETERS.items()} | {
    "likelihood": "loss",
    "kind": "normalize",
    **{name: name for name in (*READING, "layer", "batch_key", "label_key", "resume")},
}
#: A parameter in a message: NAME=VALUE, or a bare name that is no ordinary word. Paths are left alone.
_PARAMETER = re.compile(
    rf"(?<!--set )(?<![\w./'-])(?:({'|'.join(_FLAG_OF)})=('[^']*'|[(\[][^)\]]*[)\]]|[\w.+-]*\w)"
    rf"|({'|'.join(name for name in _FLAG_OF if '_' in name)})(?![\w/'-]))"
)
#: The shape of images in a message. It has no flag of its own.
_SHAPE = re.compile(r"(?<!--set )\b(set )?image_shape=\(([^)]*)\)")

#: Settings of how a run works, not of what it computes. They may differ when a run is resumed.
_MANNER = (
    "data", "out", "follow_links", "untrusted", "threads", "max_memory", "resume", "checkpoint_minutes",
    "walltime_margin", "quiet", "dry_run",
)  # fmt: skip
#: Parameters of estimators that a single fit from the command line does not use.
_WITHOUT_EFFECT = ("warm_start", "verbose")
_NEVER_STORED = ("resume", "quiet", "dry_run")


class UsageError(Exception):
    """The command line or its config file is wrong: exit code 2."""


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """All settings of ``narrows fit``; None means the default of the estimator."""

    data: str
    out: str
    estimator: str = "autoencoder"
    components: int = 32
    hidden: tuple[int, ...] | None = None
    loss: str | None = None
    epochs: int = 100
    batch_size: int = 256
    normalize: str = "auto"
    layer: str | None = None
    genes_by_cells: bool = False
    header: bool | None = None
    index_column: str | bool | None = None
    drop_columns: tuple[str, ...] | None = None
    modality: str | None = None
    batch_key: str | None = None
    label_key: str | None = None
    follow_links: bool = False
    untrusted: bool = False
    precision: str = "float32"
    backend: str = "auto"
    threads: int | None = None
    seed: int = 0
    set: Mapping[str, Any] = field(default_factory=dict)
    max_memory: int | None = None
    resume: str = "auto"
    checkpoint_minutes: float = 10.0
    walltime_margin: float = 120.0
    quiet: bool = False
    dry_run: bool = False

    def estimator_params(self) -> dict[str, Any]:
        """Constructor arguments of the estimator."""
        params = {parameter: getattr(self, field) for field, parameter in _PARAMETERS.items()}
        params = {name: value for name, value in params.items() if value is not None or name == "n_threads"}
        for name in sorted(self.set.keys() & {*_PARAMETERS.values(), "likelihood"}):
            raise UsageError(f"--set {name}: use the flag --{_flag(_FLAG_OF[name])} instead")
        return params | dict(self.set)

    def build(self) -> Any:
        """The unfitted estimator, with checked parameters.

        Raises
        ------
        UsageError
            The estimator does not have a parameter, or its value is out of range.
        """
        from ..fitting.parameters import check_parameters
        from ..models import estimator_class

        cls = estimator_class(self.estimator)
        params = self.estimator_params()
        known = cls().get_params()
        if "likelihood" in known and "loss" in params:
            params["likelihood"] = params.pop("loss")
        if self.estimator == "linear" and self.loss == "mse":
            del params["loss"]  # its only loss, and no parameter
        for name in params.keys() - known.keys():
            wrong = f"--estimator {self.estimator} has no such parameter"
            if name in _FLAG_OF:
                raise UsageError(f"--{_flag(_FLAG_OF[name])}: {wrong}; leave the flag out")
            others = ", ".join(sorted(known.keys() - _FLAG_OF.keys() - set(_WITHOUT_EFFECT)))
            hint = did_you_mean(name, known.keys() - set(_WITHOUT_EFFECT))
            raise UsageError(f"--set {name}: {wrong}{in_flags(hint)}; it has {others}")
        for name in _WITHOUT_EFFECT:
            if name in self.set:
                raise UsageError(f"--set {name}: this parameter has no effect on the command line; leave it out")
        estimator = cls(**params)
        try:
            check_parameters(estimator)
        except (TypeError, ValueError) as error:
            text = str(error)
            raise UsageError(f"--set {text}" if text.partition("=")[0] in self.set else text) from None
        if self.normalize in ("log1p", "standard", "minmax") and LOSSES[estimator.loss].raw_counts:
            raise UsageError(
                f"--normalize {self.normalize} does not fit --loss {estimator.loss}, which needs raw "
                "counts: use --normalize none"
            )
        if self.batch_key is not None:
            if self.genes_by_cells:
                raise UsageError("--batch-key needs cells as rows: leave out --genes-by-cells, or the flag --batch-key")
            try:
                estimator._check_conditioned()
            except ValueError as error:
                raise UsageError(f"--batch-key: {error}") from None
        return estimator

    def resolved(self, estimator: Any) -> FitSettings:
        """These settings with the defaults of the estimator and absolute paths filled in."""
        given = estimator.get_params()
        hidden = given.get("hidden_layer_sizes")
        hidden = (hidden,) if isinstance(hidden, int) else hidden and tuple(hidden)
        data = os.path.realpath(self.data) if Path(self.data).exists() else self.data
        return dataclasses.replace(
            self,
            data=data,
            out=os.path.realpath(self.out),
            hidden=hidden,
            loss=estimator.loss if {"loss", "likelihood"} & given.keys() else None,
        )

    def stored(self) -> dict[str, Any]:
        """The content of ``config.toml``, by flag names."""
        return {
            _flag(name): _plain(value)
            for name, value in vars(self).items()
            if name not in _NEVER_STORED and value is not None and not (name == "set" and not value)
        }

    def identity(self) -> dict[str, Any]:
        """The settings that two equal runs share, flat and by flag names; None if unset."""
        flat = {_flag(n): _plain(v) for n, v in vars(self).items() if n not in _MANNER and n != "set"}
        return flat | {f"set.{name}": _plain(value) for name, value in self.set.items()}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``" (did you mean WORD?)"`` with the known word that is most like a misspelt one; empty if none is."""
    found = difflib.get_close_matches(word.lower(), list(known), n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def _flag(name: str) -> str:
    return name.replace("_", "-")


def in_flags(message: str) -> str:
    """A message of the library in the words of the command line: ``n_threads=0`` becomes ``--threads 0``."""

    def flag(found: re.Match[str]) -> str:
        name, value = found[1] or found[3], found[2]
        if value == "False":
            return f"--no-{_flag(_FLAG_OF[name])}"
        shown = "" if value in (None, "True") else " " + re.sub(r"^['(\[]|[')\]]$|(?<=,) ", "", value)
        return f"--{_flag(_FLAG_OF[name])}{shown}"

    def shape(found: re.Match[str]) -> str:
        return f"{'give ' if found[1] else ''}--set image_shape={found[2].replace(' ', '')}"

    return _SHAPE.sub(shape, _PARAMETER.sub(flag, message))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def parse_size(text: str) -> int:
    """Bytes from ``8GB``, ``500 MB``, ``2GiB`` or a plain number; GB is 10**9 and GiB 2**30.

    Raises
    ------
    ValueError
        Not a size, or not positive.
    """
    compact = text.replace(" ", "").lower()
    units = {"": 1, "b": 1}
    for power, letter in enumerate("kmgt", start=1):
        units |= {letter: 1000**power, f"{letter}b": 1000**power, f"{letter}ib": 1024**power}
    digits = compact.rstrip("abcdefghijklmnopqrstuvwxyz")
    unit = compact[len(digits) :]
    try:
        size = float(digits) * units[unit]
    except (ValueError, KeyError):
        raise ValueError(f"{text!r} is not a size; write 8GB, 500MB or 2GiB") from None
    if not (math.isfinite(size) and size >= 1):
        raise ValueError(f"{text!r} is not a positive size")
    return int(size)


def show_size(n_bytes: float) -> str:
    """Bytes as ``1.50 GB`` or ``230 MB``."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{max(1, round(n_bytes / 1e6))} MB"


def parse_setting(text: str) -> tuple[str, Any]:
    """Parse ``name=value`` of ``--set``. A value is a number, True, False, None or a tuple, else text.

    Raises
    ------
    ValueError
        There is no ``=`` or no name.
    """
    name, equals, value = text.partition("=")
    name = name.strip().replace("-", "_")
    if not equals or not name.isidentifier():
        raise ValueError(f"{text!r} is not of the form name=value")
    return name, parse_literal(value.strip())


def parse_literal(text: str) -> Any:
    """Parse a Python literal, or ``true``, ``false`` and ``none`` in any case. Everything else is text."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return value if isinstance(value, bool | int | float | str | tuple | list) else text


def parse_column(text: str) -> str | bool:
    """Parse ``--index-column``: a name or a number; False for ``none``."""
    return False if text.strip().lower() == "none" else text


def parse_columns(text: str) -> tuple[str, ...]:
    """Parse ``--drop-columns``: names or numbers with commas between them; a name with a comma stands in quotes.

    Raises
    ------
    ValueError
        A name is empty.
    """
    try:
        names = tuple(name.strip() for name in next(csv.reader([text], skipinitialspace=True), []))
    except csv.Error:  # a line end outside quotes
        names = ()
    if not names or "" in names:
        raise ValueError(f"{text!r} is not a list of columns; write NAME,NAME or numbers from 0")
    return names


_BYTES = "file://"


def storable(text: str) -> str:
    """A text that a UTF-8 file can hold: itself, or for a path of other bytes ``file://`` and the bytes, as in URLs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return _BYTES + urllib.parse.quote_from_bytes(os.fsencode(text))
    return text


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file with the texts that were given to `storable`."""

    def restored(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: restored(item) for name, item in value.items()}
        if isinstance(value, list):
            return [restored(item) for item in value]
        if isinstance(value, str) and value.startswith(_BYTES):
            path = os.fsdecode(urllib.parse.unquote_to_bytes(value.removeprefix(_BYTES)))
            return path if storable(path) == value else value
        return value

    table: dict[str, Any] = restored(tomllib.loads(path.read_text(encoding="utf-8")))
    return table


def read_config(path: Path) -> dict[str, Any]:
    """Defaults from a TOML file, by field names. The table ``[run]``, which fit adds, is ignored.

    Raises
    ------
    UsageError
        The file is missing, is not TOML, or has an unknown key.
    """
    try:
        table = read_toml(path)
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror or error}") from None
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise UsageError(f"--config {path} is not a TOML file: {error}") from None
    table.pop("run", None)
    known = {f.name for f in dataclasses.fields(FitSettings)}
    out: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in known:
            raise UsageError(
                f"--config {path}: unknown key {key!r}{did_you_mean(_flag(name), map(_flag, known))}; "
                f"known: {', '.join(sorted(_flag(n) for n in known))}"
            )
        if isinstance(value, Mapping) != (name == "set"):
            raise UsageError(f"--config {path}: {key!r} must {'' if name == 'set' else 'not '}be a table")
        out[name] = value
    return out
