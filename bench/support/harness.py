"""Libraries side by side: each library has its own process, and the processes take turns.

Promises:

- A process holds one library, so the threads and settings of another cannot disturb it.
- A process that has no turn is stopped, because some libraries' threads spin for long after their work.
- An error in a worker is an error here.

Never: imports anything but the standard library, so that a worker holds only what it measures.

Parent and worker exchange lines of JSON over the worker's standard input and output.
"""

from __future__ import annotations

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
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, Self

ROOT = Path(__file__).parents[2]
TURN_SECONDS = 0.05
"""Least length of a timed run; shorter work is repeated."""
TRIES = 3
"""Runs of each way of doing something before the fastest way is chosen."""
DEVICES = ("cpu", "cuda")


def device() -> str:
    """The device on which this process and its parent compare libraries."""
    return os.environ.get("NARROWS_BENCH_DEVICE", DEVICES[0])


def installed(modules: Sequence[str]) -> bool:
    return all(find_spec(module) for module in modules)


def prepare(threads: int, device: str = DEVICES[0]) -> None:
    """Limit this process and its workers to as many CPUs as threads: every library obeys that limit.

    Libraries see a GPU only if the device is ``"cuda"``. SIGTERM becomes an ordinary exit, which ends the workers; a
    stopped worker would outlive this process.

    Raises
    ------
    ValueError
        The process may use fewer CPUs.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    environment = {
        "NARROWS_BENCH_DEVICE": device,
        "OMP_NUM_THREADS": str(threads),
        "KERAS_BACKEND": "tensorflow",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    if device == "cuda":
        # A stopped library keeps its memory on the GPU, so none may take all of it.
        environment |= {"NARROWS_BACKEND": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        # Without this, JAX falls back to the CPU with a warning if it cannot have the GPU.
        environment["JAX_PLATFORMS"] = "cuda"
    else:
        # A pool of compiler processes would keep running beside the timing.
        environment |= {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    os.environ.update(environment)
    if hasattr(os, "sched_setaffinity"):
        cpus = sorted(os.sched_getaffinity(0))
        if len(cpus) < threads:
            raise ValueError(f"--threads {threads}: this process may use only {len(cpus)} CPUs")
        os.sched_setaffinity(0, cpus[:threads])


class Worker:
    """A module of bench that runs `serve` in its own process; it is stopped except while it answers a request."""

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
            The worker failed. The message ends with its standard error.
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
    # Output that a library prints must not mix with the answers.
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(functions[request.pop("call")](**request)) + "\n")
        answers.flush()


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def repeated(run: Callable[[], object]) -> Callable[[int], None]:
    """A function that calls `run` as often as its argument says."""

    def times(n: int) -> None:
        for _ in range(n):
            run()

    return times


class Repeated:
    """The fastest of several ways of doing the same work, repeated so often that it can be timed.

    Parameters
    ----------
    ways : mapping
        Functions that do the work as many times as their argument says.

    Attributes
    ----------
    name : str
        Name of the fastest way.
    tried : dict
        Seconds of each way, the median of a few runs.
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
        """Seconds of the work, by default in the fastest way, after a run that wakes threads and fills caches."""
        run, repeats = self._ways[name or self.name], self._repeats[name or self.name]
        run(max(1, repeats // 2))
        return seconds(lambda: run(repeats)) / repeats


class Contender(Protocol):
    """What a worker runs: one library at one case."""

    def start(self, *args: Any, **kwargs: Any) -> Any:
        """Prepare, and return what must be checked before anything is timed."""

    def turn(self) -> float:
        """Milliseconds of the work."""


def interleaved(workers: Sequence[Worker], rounds: int) -> Iterator[Worker]:
    """The worker whose turn it is: each once a round, in an order that reverses from round to round."""
    for i in range(rounds):
        yield from workers[:: -1 if i % 2 else 1]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": median, "q1": q1, "q3": q3}


def in_turns(workers: Sequence[Worker], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each started worker, with the median of its ratios to the first worker, round by round."""
    ms: dict[str, list[float]] = {worker.name: [] for worker in workers}
    for worker in interleaved(workers, rounds):
        ms[worker.name].append(worker.ask("turn"))
    first = ms[workers[0].name]
    return {
        name: spread(values) | {"ratio": statistics.median(v / b for v, b in zip(values, first, strict=True))}
        for name, values in ms.items()
    }
