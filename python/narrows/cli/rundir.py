"""The output folder of a fit or a sweep: who may write to it, and which files it holds.

- A run accepts a folder that is missing, empty, or made by an earlier run of the same command. It refuses any other
  folder before it writes a byte.
- Only one run at a time writes to a folder, on file systems with locks.
- ``_SUCCESS`` is the last file of a run and the first one that a new run removes. It holds the digest of each result.
  If it exists and the digests agree, the run is complete.
- ``config.toml`` holds the settings and the digest of the input. Two runs are the same if these agree.
- Files are replaced atomically. Only ``run.log`` and ``history.jsonl`` grow, by whole lines.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TextIO

from ..errors import OutputError, ResumeError
from ..persistence import atomic_write, file_digest, remove_temporaries
from ..training import Callback, Progress
from ..training.checkpoint import differences, flat
from .settings import read_toml, storable

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
    """Files that a new run removes first."""
    needed: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("model.safetensors",), ("latent.h5ad", "latent.npy"), ("metrics.json",), ("history.jsonl",),
    )  # fmt: skip
    """Of each group, one file must exist after a finished run."""
    kept: ClassVar[tuple[str, ...]] = (
        "model.safetensors", "latent.h5ad", "latent.npy", "latent_obs_names.txt", "metrics.json", "history.jsonl",
    )  # fmt: skip
    """Results that do not change after the run. ``_SUCCESS`` holds their digests."""

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
        """Whether a run has finished here and its results still exist."""
        return self.succeeded and not self.missing

    @property
    def missing(self) -> list[str]:
        """Results of a finished run that do not exist, or are not as they were written."""
        known = self._digests()
        damaged = [name for name, digest in known.items() if _digest(self / name) != digest]
        absent = [" or ".join(names) for names in self.needed if known.keys().isdisjoint(names)]
        return damaged + absent

    def _digests(self) -> dict[str, str]:
        """The digest of each result when the run finished."""
        try:
            lines = (self / "_SUCCESS").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return {}
        pairs = (line.partition("  ") for line in lines)
        return {name: digest for digest, _, name in pairs if name in self.kept}

    @property
    def begun(self) -> bool:
        """Whether the folder holds results or a checkpoint that could be lost."""
        return self.succeeded or self.checkpoint.exists() or (self / "model.safetensors").exists()

    @property
    def _mark(self) -> str:
        return f"# narrows {self.command}:"

    def inspect(self) -> None:
        """Raise OutputError if the folder holds other files or cannot be written; write nothing."""
        if self.path.is_symlink() and not self.path.exists():
            raise OutputError(f"--out {self.path} is a link that leads to nothing, or to itself: give a folder")
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"--out {self.path} is a file: give a folder")
        nearest = self.path
        while not nearest.exists() and nearest != nearest.parent:
            nearest = nearest.parent
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise OutputError(f"--out {self.path} cannot be written: {nearest} is not a writable folder")
        if not self.path.exists():
            return
        content = [p.name for p in self.path.iterdir() if not (p.name.startswith(".") and p.suffix == ".tmp")]
        if content and not self.ours:
            raise OutputError(
                f"--out {self.path} is not empty and holds no run of narrows {self.command} (it has "
                f"{min(content)}): give an empty or new folder"
            )

    @property
    def ours(self) -> bool:
        """Whether a run of this command made the folder."""
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
        """Create the folder, check that it is writable, and lock it against other runs.

        Raises
        ------
        OutputError
            It holds other files, cannot be written, or another run writes to it.
        """
        self.inspect()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise OutputError(f"--out {self.path} cannot be written: {error.strerror or error}") from None
        with _alone_in(self.path) as alone:
            # Without locks, another run may be writing now. A day is longer than any write takes.
            age = 0.0 if alone else 86400.0
            remove_temporaries(self.path, (*self.made, "config.toml", "run.log"), age=age)
            remove_temporaries(self.checkpoint.parent, (self.checkpoint.name,), age=age)
            yield

    def _subfolders(self) -> None:
        self.checkpoint.parent.mkdir(exist_ok=True)

    def stored(self) -> dict[str, Any]:
        """The settings of the run in the folder, flat; empty if there is none."""
        if not self.begun:
            return {}
        try:
            table = read_toml(self / "config.toml")
        except (OSError, ValueError) as error:
            raise ResumeError(
                f"{self / 'config.toml'} cannot be read ({error}): use another --out, or --resume never"
            ) from None
        return flat(table)

    def check_same(self, identity: Mapping[str, Any]) -> bool:
        """Whether the folder holds a run with this identity.

        Parameters
        ----------
        identity : mapping
            Values by their names in ``config.toml`` (``set.alpha``, ``run.input_sha256``); None if unset.

        Raises
        ------
        ResumeError
            The folder holds a run that differs; the message names the fields.
        """
        there = self.stored()
        if not there:
            return False
        names = [*identity, *(name for name in there if name.startswith("set.") and name not in identity)]
        differing = differences(there, identity, names)
        if differing:
            raise ResumeError(
                f"--out {self.path} holds another run; it differs in {', '.join(differing)}: "
                "use another --out, or --resume never to replace it"
            )
        return True

    def resumes(self, identity: Mapping[str, Any], resume: str) -> bool:
        """Whether ``--resume`` lets a run with this identity continue the one in the folder.

        Raises
        ------
        ResumeError
            The folder holds a run that differs, or `resume` is ``"require"`` and it holds none.
        """
        known = resume != "never" and self.check_same(identity)
        if resume == "require" and not known:
            raise ResumeError(f"--out {self.path} holds no {self.command} to resume: use --resume auto to start one")
        return known

    def note_finished(self) -> None:
        log.info("%s is already finished: nothing to do (--resume never starts again)", self.path)

    def clear(self) -> None:
        """Remove the files of an earlier run, ``_SUCCESS`` first; keep the log."""
        for name in self.made:
            (self / name).unlink(missing_ok=True)
        shutil.rmtree(self.checkpoint.parent, ignore_errors=True)

    def write_config(self, settings: Mapping[str, Any]) -> None:
        head = f"{self._mark} the settings of this run; `narrows {self.command} --config` of this file repeats it\n\n"
        atomic_write(self / "config.toml", (head + to_toml(settings)).encode())
        self._subfolders()  # after config.toml, which marks the folder as ours

    def write_json(self, name: str, value: Any) -> None:
        """Write strict JSON: NaN and infinity become null."""
        text = json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False)
        # JSON has the same escapes as Python for what is not UTF-8, such as bytes of a path.
        atomic_write(self / name, (text + "\n").encode(errors="backslashreplace"))

    def write_history(self, history: Mapping[str, list[float]]) -> None:
        """Write the whole history, one line per epoch."""
        n_epochs = len(history["loss"])
        lines = [_line(i + 1, {name: column[i] for name, column in history.items()}) for i in range(n_epochs)]
        atomic_write(self / "history.jsonl", "".join(lines).encode())

    def write_lines(self, name: str, lines: Iterable[Any]) -> None:
        atomic_write(self / name, "".join(f"{line}\n" for line in lines).encode())

    def write_success(self) -> None:
        """Write the last file, with the digests of the results, in the format of ``sha256sum``."""
        found = {name: _digest(self / name) for name in self.kept}
        atomic_write(self / "_SUCCESS", "".join(f"{found[name]}  {name}\n" for name in found if found[name]).encode())

    def log_handler(self) -> logging.Handler:
        """A handler that appends to ``run.log``."""
        path = self / "run.log"
        if not path.exists():
            atomic_write(path, f"{self._mark} log\n".encode())
        handler = _RunLog(path, encoding="utf-8", errors="backslashreplace")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S%z"))
        return handler


@contextlib.contextmanager
def _alone_in(path: Path) -> Iterator[bool]:
    """Lock a folder, if the file system has locks; return whether it has. The lock ends with the process."""
    if os.name == "nt":
        yield False
        return
    import fcntl

    folder, locked = os.open(path, os.O_RDONLY), True
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"another run is writing to --out {path}: wait for its end, or give another folder"
            ) from None
        except OSError as error:  # some file systems have no locks, or none for folders
            log.debug("%s cannot be locked: %s", path, error)
            locked = False
        yield locked
    finally:
        os.close(folder)


def _digest(path: Path) -> str | None:
    try:
        return file_digest(path)
    except FileNotFoundError:
        return None


class _RunLog(logging.FileHandler):
    """Appends to ``run.log``. If that fails, as on a full disk, the run goes on and warns once."""

    def handleError(self, record: logging.LogRecord) -> None:
        print(f"narrows: warning: {self.baseFilename} is not complete: {sys.exc_info()[1]}", file=sys.stderr)
        self.setLevel(logging.CRITICAL + 1)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


class HistoryWriter(Callback):
    """Appends one line per epoch to ``history.jsonl`` and flushes it to disk.

    A resumed run first removes the lines of epochs that it repeats, and an incomplete last line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def on_epoch_end(self, progress: Progress) -> None:
        try:
            self._append(progress)
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror or error}") from error

    def _append(self, progress: Progress) -> None:
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
            with contextlib.suppress(OSError):  # the last line was flushed, or its error was raised
                self._file.close()
            self._file = None


def read_history(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``history.jsonl`` up to the first incomplete one."""
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
    """TOML text of a table of strings, numbers, booleans, lists and tables; None is left out."""
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
        # TOML understands JSON's escapes. Only DEL differs: JSON leaves it bare, TOML forbids that.
        return json.dumps(storable(value), ensure_ascii=False).replace("\x7f", "\\u007F")
    raise TypeError(f"{value!r} cannot be written to a TOML file")


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
