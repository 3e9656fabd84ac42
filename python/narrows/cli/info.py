"""The command info: what a model file or the folder of a run is.

It reads only the model file and the JSON files of the folder, compiles nothing and writes nothing.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..fitting.files import stored_normalizer, stored_source
from ..fitting.parameters import plain_parameters
from ..models import REGISTRY, load
from ..persistence import written_by
from . import report, sweep
from .rundir import RunDir
from .settings import read_toml

__all__ = ["as_text", "describe"]

NAMES = 5
"""Names of features that are shown."""


def describe(path: Path) -> dict[str, Any]:
    """What `path` holds, as JSON values.

    Raises
    ------
    DataError
        A folder without a model or a run, or with a damaged file.
    ModelFileError
        A file that is no model, or a damaged one.
    FileNotFoundError
        There is nothing.
    """
    if not path.is_dir():
        return _model(path)
    if (path / "sweep.json").exists():
        return _sweep(path)
    command = next((kind.command for kind in (RunDir, sweep.SweepDir) if kind(path).ours), None)
    known = {} if command is None else _run(path)
    if (path / "model.safetensors").exists():
        return _model(path / "model.safetensors") | known
    if command is None:
        raise DataError(f"{path} holds no model.safetensors and no run of narrows")
    return {"path": str(path), "kind": f"unfinished {command}", **known}


def as_text(found: dict[str, Any]) -> str:
    """The description, one fact on a line."""
    lines = {
        name.replace("_", " "): _text(name, value)
        for name, value in found.items()
        if value is not None and name != "parameters"
    }
    width = max(map(len, lines))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in lines.items())


def _model(path: Path) -> dict[str, Any]:
    model = load(path)
    spec, source, history = model.plan_.spec, stored_source(model), model.history_
    names, facts = model._feature_names, model.metadata_.get("source")
    n_rows = facts.get("n_rows") if isinstance(facts, dict) else None
    defaults, params = type(model)().get_params(), plain_parameters(model)
    validated = [loss if math.isfinite(loss) else math.inf for loss in history.get("val_loss", [])]
    val_loss = min(validated, default=math.inf)
    # Both losses are of one epoch, as in metrics.json: the best one if there were held-out rows.
    train_loss = history["loss"][validated.index(val_loss)] if val_loss < math.inf else model.loss_
    normalizer = stored_normalizer(model) if "normalizer" in model.metadata_ else None
    return {
        "path": str(path),
        "kind": "model",
        "estimator": type(model).__name__,
        "name": next((short for short, entry in REGISTRY.items() if entry.cls == type(model).__name__), None),
        "loss": model.loss,
        "n_components": spec.n_components,
        "layers": [
            {
                "inputs": layer.n_in,
                "outputs": layer.n_out,
                "activation": layer.activation.name.lower(),
                "convolution": layer.convolution is not None,
                "tied": layer.tied_to is not None,
            }
            for layer in spec.layers
        ],
        "n_parameters": int(sum(array.size for array in model._network.parameters.values())),
        "parameters": params,
        "changed_parameters": {name: value for name, value in params.items() if value != defaults[name]},
        "rows": n_rows if isinstance(n_rows, int) else None,
        "features": int(model.n_features_in_),
        "feature_names": None if names is None else [str(name) for name in names[:NAMES]],
        "batches": model.batches_.tolist() if model._conditions is not None else None,
        "data": source.get("name"),
        "layer": source.get("layer"),
        "input_sha256": source.get("sha256"),
        "normalisation": None if normalizer is None else f"{normalizer.resolved_} ({normalizer.reason_})",
        "epochs": int(model.n_iter_),
        "train_loss": float(train_loss) if math.isfinite(train_loss) else None,
        "val_loss": val_loss if val_loss < math.inf else None,
        "stopped": report.REASONS["max_iter"]
        if model.n_iter_ >= model.max_iter
        else f"{report.REASONS['converged']}, or a callback",
        "version": written_by(path),
        "bytes": path.stat().st_size,
    }


def _run(path: Path) -> dict[str, Any]:
    """What the folder of a run adds."""
    found: dict[str, Any] = {}
    if (path / "metrics.json").exists():
        metrics = _json(path / "metrics.json")
        found = {
            "status": metrics.get("status"),
            "stopped": report.REASONS.get(str(metrics.get("exit_reason")), metrics.get("exit_reason")),
            "rows": metrics.get("n_rows"),
            "data": metrics.get("data"),
        }
    elif (path / "config.toml").exists():
        try:
            table = read_toml(path / "config.toml")
        except (OSError, ValueError) as error:
            raise DataError(f"{path / 'config.toml'} cannot be read ({error})") from None
        found = {"status": "running or killed", "data": table.get("data"), "rows": table.get("run", {}).get("n_rows")}
    if (path / "checkpoints" / "last.safetensors").exists():
        found["checkpoint"] = str(path / "checkpoints" / "last.safetensors")
    return found


def _sweep(path: Path) -> dict[str, Any]:
    result = _json(path / "sweep.json")
    rows = result.get("sizes") or []
    return {
        "path": str(path),
        "kind": "sweep",
        "status": result.get("status"),
        "estimator": result.get("estimator"),
        "loss": result.get("loss"),
        "data": result.get("data"),
        "rows": result.get("n_rows"),
        "features": result.get("n_features"),
        "sizes": [row.get("n_components") for row in rows],
        "elbow": result.get("elbow"),
        "input_sha256": result.get("input_sha256"),
        "version": result.get("version"),
        "table": sweep.table_text(result) if rows else None,
    }


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error})") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} is damaged (no JSON object)")
    return found


def _text(name: str, value: Any) -> str:
    if name == "layers":
        kinds = ["convolution to " * each["convolution"] + f"{each['outputs']} {each['activation']}" for each in value]
        return " - ".join([str(value[0]["inputs"]), *kinds])
    if name == "changed_parameters":
        return ", ".join(f"{key}={item!r}" for key, item in sorted(value.items())) or "none"
    if name == "feature_names":
        return ", ".join(value) + ", ..." * (len(value) == NAMES)
    if name == "table":
        return f"\n{value}"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
