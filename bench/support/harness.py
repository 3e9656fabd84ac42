"""Libraries side by side: a process for each, and turns that one of them has at a time; and what the scripts share.

Promises: one library to a process, so that no other's threads or flags are in it; a process that has no turn is
stopped, since the threads of some libraries spin for long after their work; an error in a worker is an error here.
Never: imports anything but the standard library where a worker can notice, so that it holds only what it measures.

Parent and child exchange lines of JSON over the child's standard input and output.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any, Protocol, Self

TURN_SECONDS = 0.05
"""Least length of what is timed; what is shorter is repeated."""
TRIES = 3
"""Runs of each way to do something before the fastest is chosen."""
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"


DEVICES = ("cpu", "cuda")


def device() -> str:
    """Where the libraries of this process and its parent are compared."""
    return os.environ.get("NARROWS_BENCH_DEVICE", DEVICES[0])


def prepare(threads: int, device: str = DEVICES[0]) -> None:
    """Let this process and the workers it starts use as many CPUs as threads: the one limit that every library obeys.
    No library sees a GPU but on ``"cuda"``, where narrows takes its backend of that name and the others theirs.

    From here on SIGTERM is an exit like others, which ends the workers: stopped, they would outlive this process.

    Raises
    ------
    ValueError
        The process has fewer.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    environment = {
        "NARROWS_BENCH_DEVICE": device,
        "OMP_NUM_THREADS": str(threads),
        "KERAS_BACKEND": "tensorflow",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    if device == "cuda":
        # Libraries that are stopped keep what they have of the GPU's memory, which must not be all of it.
        environment |= {"NARROWS_BACKEND": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        # It would take the CPU with a warning, where it cannot have the GPU.
        environment["JAX_PLATFORMS"] = "cuda"
    else:
        # Compiling in a pool of processes would leave them waiting beside the timing.
        environment |= {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    os.environ.update(environment)
    if hasattr(os, "sched_setaffinity"):
        cpus = sorted(os.sched_getaffinity(0))
        if len(cpus) < threads:
            raise ValueError(f"--threads {threads}: this process may use {len(cpus)} CPUs")
        os.sched_setaffinity(0, cpus[:threads])


class Worker:
    """A module of bench that runs `serve` in a process of its own, stopped but while it is asked something."""

    def __init__(self, module: str, name: str) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"bench.{module}", "--serve"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._process.send_signal(signal.SIGSTOP)

    def ask(self, call: str, **arguments: Any) -> Any:
        """What the worker's function `call` returns.

        Raises
        ------
        RuntimeError
            The worker failed; the message ends with what it wrote.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.send_signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"call": call} | arguments) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(f"{self.name}: {call} failed (exit code {code})\n{self._errors.read()[-4000:]}")
        self._process.send_signal(signal.SIGSTOP)
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def serve(functions: Mapping[str, Callable[..., Any]]) -> None:
    """Answer the requests of a `Worker` until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    # What libraries print must not come between the answers.
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(functions[request.pop("call")](**request)) + "\n")
        answers.flush()


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Repeated:
    """The fastest of several ways to do the same, and how often to repeat it so that it can be timed.

    Parameters
    ----------
    ways : mapping
        Functions that do it as many times as their argument says.

    Attributes
    ----------
    name : str
        Of the fastest.
    tried : dict
        Seconds of each, the median of a few runs.
    """

    def __init__(self, ways: Mapping[str, Callable[[int], object]]) -> None:
        repeats: dict[str, int] = {}
        for name, run in ways.items():
            run(1)
            repeats[name] = max(1, math.ceil(TURN_SECONDS / min(seconds(lambda: run(1)) for _ in range(2))))  # noqa: B023
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(TRIES):
            for name, run in ways.items():
                n = repeats[name]
                times[name].append(seconds(lambda: run(n)) / n)  # noqa: B023
        self.tried = {name: statistics.median(found) for name, found in times.items()}
        self.name = min(self.tried, key=lambda name: self.tried[name])
        self._ways, self._repeats = ways, repeats

    def turn(self, name: str | None = None) -> float:
        """Seconds of one, by default in the fastest way, after a run that wakes the threads and fills the caches."""
        run, repeats = self._ways[name or self.name], self._repeats[name or self.name]
        run(max(1, repeats // 2))
        return seconds(lambda: run(repeats)) / repeats


def interleaved(workers: Sequence[Worker], rounds: int) -> Iterator[Worker]:
    """Whose turn it is: everyone once a round, in an order that turns round."""
    for i in range(rounds):
        yield from workers[:: -1 if i % 2 else 1]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": median, "q1": q1, "q3": q3}


# --- scripts ---------------------------------------------------------------------------------------------------------


def arguments(doc: str | None, out: Path | None, held: str) -> argparse.ArgumentParser:
    """A parser of the options that all scripts have: --out, and --lock, which is `held` for some time."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--lock", type=Path, help=f"file to hold a lock on{held}, as flock(1) does")
    return parser


def compared(doc: str | None, out: Path | Mapping[str, Path], held: str, rounds: int) -> argparse.Namespace:
    """The options of a script that compares libraries, for whose --threads this process is now prepared; and for
    --device, of which there is a choice if each has an `out` of its own."""
    by_device = out if isinstance(out, Mapping) else {DEVICES[0]: out}
    parser = arguments(doc, None, held)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--device", choices=tuple(by_device), default=DEVICES[0])
    options = prepared(parser)
    options.out = options.out or by_device[options.device]
    return options


def prepared(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of a parser that is given --threads, for which this process is now prepared, and for its --device if
    it has that."""
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    try:
        prepare(options.threads, getattr(options, "device", DEVICES[0]))
    except ValueError as error:
        parser.error(str(error))
    return options


def of_gpu() -> dict[str, dict[str, str]]:
    """What else belongs to a result on a GPU: its name, the driver's version and CuPy's."""
    if device() != "cuda":
        return {}
    asked = ("name", "driver_version", "memory.total", "clocks.max.sm")
    command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader"]
    try:
        out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
        found = dict(zip(asked, out.splitlines()[0].split(", "), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        found = {}  # some containers have a GPU and not its tools
    for name in packages_distributions().get("cupy", [])[:1]:
        found["cupy"] = version(name)
    return {"gpu": found}


def about(options: argparse.Namespace, *packages: str) -> dict[str, Any]:
    """What stands above every result: when, where, with how many threads and rounds, and of which versions."""
    from narrows import __version__
    from narrows.benchmark import machine

    named = {name: getattr(options, name) for name in ("threads", "rounds") if hasattr(options, name)}
    versions = {"narrows": __version__} | {name: version(name) for name in packages} if packages else {}
    return {"date": date.today().isoformat(), "machine": machine()} | named | versions | of_gpu()


def store(report: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


class Contender(Protocol):
    """What a worker of a comparison runs: one library at one case."""

    def start(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Prepare; what is to be checked before anything is timed."""

    def turn(self) -> float:
        """Milliseconds."""


def script(main: Callable[[], None], contender: Callable[[], Contender] | None = None) -> None:
    """Run a script that compares libraries, or, where a `Worker` has started it, one of its contenders."""
    if contender is not None and sys.argv[1:] == ["--serve"]:
        runs = contender()
        serve({"start": runs.start, "turn": runs.turn})
        return
    try:
        main()
    except PackageNotFoundError as error:
        sys.exit(f"error: {error.name} is not installed")
    except RuntimeError as error:
        sys.exit(f"error: {error}")


@contextlib.contextmanager
def lock(path: Path | None) -> Iterator[None]:
    """Hold the lock on a file, as flock(1) does, so that timings on a shared machine come one after the other."""
    if path is None:
        yield
        return
    import fcntl

    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
