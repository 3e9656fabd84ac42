"""The folder a fit or a sweep writes to: whose it is, what belongs there, and that each file is whole.

- A folder is taken only if it is missing, empty, or was made by an earlier run of the same command; anything else is
  refused before a byte is written.
- One run at a time writes to it: others are refused, on file systems that have locks.
- ``_SUCCESS`` is the last file of a run and the first to go when one starts again: with it, all is there.
- ``config.toml`` holds the settings and the digest of the input; two runs are the same if those agree.
- Every file is replaced atomically, except ``run.log`` and ``history.jsonl``, which grow by whole lines.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TextIO

from ..errors import OutputError, ResumeError
from ..persistence import atomic_write
from ..training import Callback, Progress
from ..training.checkpoint import differences, flat

__all__ = ["HistoryWriter", "RunDir", "to_toml"]

log = logging.getLogger("narrows")


class RunDir:
    """The output folder of one fit.

    Parameters
    ----------
    path : Path
        Created, with its parents, by `claimed`.
    """

    command: ClassVar[str] = "fit"
    made: ClassVar[tuple[str, ...]] = (
        "_SUCCESS", "metrics.json", "report.html", "narrows_mqc.json", "history.jsonl", "model.safetensors",
        "latent.h5ad", "latent.npy", "latent_obs_names.txt",
    )  # fmt: skip
    """Files that a run replaces."""
    needed: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("model.safetensors",), ("latent.h5ad", "latent.npy"), ("metrics.json",), ("history.jsonl",),
    )  # fmt: skip
    """One of each is there when a run has ended."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoints" / "last.safetensors"

    @property
    def succeeded(self) -> bool:
        return (self / "_SUCCESS").exists()

    @property
    def finished(self) -> bool:
        """Whether a run has ended here, and all that it is for is still there."""
        return self.succeeded and not self.missing

    @property
    def missing(self) -> list[str]:
        """What a run that has ended must have left, and is not there."""
        return [" or ".join(names) for names in self.needed if not any((self / name).is_file() for name in names)]

    @property
    def begun(self) -> bool:
        """Whether there is something that could be lost."""
        return self.succeeded or self.checkpoint.exists() or (self / "model.safetensors").exists()

    @property
    def _mark(self) -> str:
        return f"# narrows {self.command}:"

    def inspect(self) -> None:
        """Raise OutputError if the folder belongs to something else or cannot be written; write nothing."""
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"--out {self.path} is a file: give a folder")
        nearest = self.path
        while not nearest.exists() and nearest != nearest.parent:
            nearest = nearest.parent
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise OutputError(f"--out {self.path} cannot be written (no right to write in {nearest})")
        if not self.path.exists():
            return
        content = [p.name for p in self.path.iterdir() if not (p.name.startswith(".") and p.suffix == ".tmp")]
        if content and not self._is_ours():
            raise OutputError(
                f"--out {self.path} is not empty and holds no run of narrows {self.command} (found "
                f"{min(content)}): give an empty or new folder"
            )

    def _is_ours(self) -> bool:
        for name in ("config.toml", "run.log"):
            try:
                with (self / name).open(encoding="utf-8", errors="replace") as file:
                    if file.read(len(self._mark)) == self._mark:
                        return True
            except OSError:
                continue
        return False

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Create the folder, prove that files can be made in it, and keep other runs out of it meanwhile.

        Raises
        ------
        OutputError
            It belongs to something else, cannot be written, or another run is at it.
        """
        self.inspect()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise OutputError(f"--out {self.path} cannot be written: {error.strerror or error}") from None
        with _alone_in(self.path):
            yield

    def _subfolders(self) -> None:
        self.checkpoint.parent.mkdir(exist_ok=True)

    def stored(self) -> dict[str, Any]:
        """Settings of the run that is there, flat; empty if there is nothing that could be lost."""
        if not self.begun:
            return {}
        try:
            table = tomllib.loads((self / "config.toml").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ResumeError(
                f"{self / 'config.toml'}: unreadable ({error}): use another --out, or --resume never"
            ) from None
        return flat(table)

    def check_same(self, identity: Mapping[str, Any]) -> bool:
        """Whether a run of this identity is there already.

        Parameters
        ----------
        identity : mapping
            Flat, by the names in ``config.toml`` (``set.alpha``, ``run.input_sha256``); None where unset.

        Raises
        ------
        ResumeError
            A run is there that differs; the message names the fields.
        """
        there = self.stored()
        if not there:
            return False
        names = [*identity, *(name for name in there if name.startswith("set.") and name not in identity)]
        differing = differences(there, identity, names)
        if differing:
            raise ResumeError(
                f"--out {self.path} holds another run, which differs in {', '.join(differing)}: "
                "use another --out, or --resume never to start afresh there"
            )
        return True

    def clear(self) -> None:
        """Remove what an earlier run made, ``_SUCCESS`` first; the log stays."""
        for name in self.made:
            (self / name).unlink(missing_ok=True)
        shutil.rmtree(self.checkpoint.parent, ignore_errors=True)

    def write_config(self, settings: Mapping[str, Any]) -> None:
        head = f"{self._mark} the settings of this run; `narrows {self.command} --config` of this file repeats it\n\n"
        atomic_write(self / "config.toml", (head + to_toml(settings)).encode())
        self._subfolders()  # behind what says whose the folder is

    def write_json(self, name: str, value: Any) -> None:
        """Strict JSON: NaN and infinity become null."""
        text = json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False)
        atomic_write(self / name, (text + "\n").encode())

    def write_history(self, history: Mapping[str, list[float]]) -> None:
        """The whole history at once, one line per epoch."""
        n_epochs = len(history["loss"])
        lines = [_line(i + 1, {name: column[i] for name, column in history.items()}) for i in range(n_epochs)]
        atomic_write(self / "history.jsonl", "".join(lines).encode())

    def write_lines(self, name: str, lines: Iterable[Any]) -> None:
        atomic_write(self / name, "".join(f"{line}\n" for line in lines).encode())

    def write_success(self) -> None:
        """The very last file: everything else is there."""
        atomic_write(self / "_SUCCESS", b"")

    def log_handler(self) -> logging.Handler:
        """A handler that appends to ``run.log``."""
        path = self / "run.log"
        if not path.exists():
            path.write_text(f"{self._mark} log\n", encoding="utf-8")
        handler = logging.FileHandler(path, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S%z"))
        return handler

    def size(self) -> int:
        """Bytes of all files in the folder."""
        return sum(p.stat().st_size for p in self.path.rglob("*") if p.is_file())


@contextlib.contextmanager
def _alone_in(path: Path) -> Iterator[None]:
    """Hold a lock on a folder, which the system lets go however the process ends."""
    if os.name == "nt":
        yield
        return
    import fcntl

    folder = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"--out {path} is being written by another run: wait for it to end, or give another folder"
            ) from None
        except OSError as error:  # some file systems have no locks, or none of folders
            log.debug("%s cannot be locked: %s", path, error)
        yield
    finally:
        os.close(folder)


class HistoryWriter(Callback):
    """Appends one durable line per epoch to ``history.jsonl``.

    Lines of epochs that a resumed run repeats are dropped first, a torn last line with them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def on_epoch_end(self, progress: Progress) -> None:
        if self._file is None:
            kept = [line for line in read_history(self.path) if line["epoch"] < progress.epoch]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            atomic_write(self.path, text.encode())
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(
            _line(
                progress.epoch,
                {
                    "loss": progress.loss,
                    "val_loss": progress.val_loss,
                    "learning_rate": progress.learning_rate,
                    "elapsed": progress.seconds,
                },
            )
        )
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_history(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a ``history.jsonl``; a torn line ends it."""
    lines: list[dict[str, Any]] = []
    if path.exists():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
                if line["epoch"] != len(lines) + 1:
                    break
            except (ValueError, KeyError, TypeError):
                break
            lines.append(line)
    return lines


def to_toml(table: Mapping[str, Any], prefix: str = "") -> str:
    """TOML text of a table of strings, numbers, booleans, lists of them, and tables; None is left out."""
    plain = [f"{_key(k)} = {_value(v)}\n" for k, v in table.items() if v is not None and not isinstance(v, Mapping)]
    parts = "".join(plain)
    for name, inner in table.items():
        if isinstance(inner, Mapping) and inner:
            full = f"{prefix}{_key(name)}"
            parts += f"\n[{full}]\n" + to_toml(inner, f"{full}.")
    return parts


def _key(name: str) -> str:
    bare = name.replace("_", "").replace("-", "")
    return name if bare.isascii() and bare.isalnum() else _value(name)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)  # Python's inf and nan are TOML's
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    if isinstance(value, str):
        # JSON's escapes are a part of TOML's; only DEL is bare in JSON and forbidden in TOML.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    raise TypeError(f"{value!r} has no place in a TOML file")


def _line(epoch: int, values: Mapping[str, Any]) -> str:
    return json.dumps(_finite({"epoch": epoch, **values}), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()  # a NumPy scalar
    return None if isinstance(value, float) and not math.isfinite(value) else value
