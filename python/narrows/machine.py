"""The CPUs that this process may use, and the number of threads it starts.

Promises: respects the affinity mask, the cgroup quota, and the limits of the scheduler and of OpenMP.
Never: starts a thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache

__all__ = ["MOST_THREADS", "thread_choice", "thread_count", "usable_cpus"]

MOST_THREADS = 4096
"""The limit of the native backend; all backends keep it."""


def thread_count(n_threads: int | None = None) -> int:
    """CPU threads: the argument, else ``NARROWS_NUM_THREADS``, else ``SLURM_CPUS_PER_TASK``, else `usable_cpus`."""
    return thread_choice(n_threads)[0]


def thread_choice(n_threads: int | None = None) -> tuple[int, str]:
    """`thread_count`, and the source of the number."""
    if n_threads is not None:
        if isinstance(n_threads, bool) or int(n_threads) != n_threads or not 1 <= n_threads <= MOST_THREADS:
            raise ValueError(f"n_threads={n_threads!r} must be a positive integer of at most {MOST_THREADS}, or None")
        return int(n_threads), "n_threads"
    for variable in ("NARROWS_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        if value := os.environ.get(variable):
            if not value.isdecimal() or not 1 <= int(value) <= MOST_THREADS:
                raise ValueError(f"{variable}={value!r} must be a positive integer of at most {MOST_THREADS}")
            return int(value), variable
    return usable_cpus()


def usable_cpus() -> tuple[int, str]:
    """CPUs that this process may use, and the limit that decides: affinity mask, cgroup quota, or OpenMP.

    joblib, threadpoolctl, and ``OMP_NUM_THREADS`` set the OpenMP limit so that processes do not compete for cores.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = allowed, "affinity mask"
    for limit, source in ((_cgroup_cpus(), "cgroup quota"), (_openmp_limit()(), "OpenMP limit")):
        if limit and limit < found[0]:
            found = limit, source
    return found


@cache
def _openmp_limit() -> Callable[[], int]:
    """A function that returns the number of threads OpenMP would start in the calling thread; 0 for no limit."""
    try:
        from . import _core
    except ImportError:
        first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
        number = int(first) if first.isascii() and first.isdecimal() else 0
        return lambda: number
    limit: Callable[[], int] = _core.thread_limit
    return limit


@cache
def _cgroup_cpus() -> int | None:
    """Whole CPUs in the cgroup's quota (v2, then v1), or None without a quota."""
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
    except (OSError, ValueError):
        try:
            with (
                open("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") as q,
                open("/sys/fs/cgroup/cpu/cpu.cfs_period_us") as p,
            ):
                quota, period = q.read().strip(), p.read().strip()
        except OSError:
            return None
    if quota in ("max", "-1"):
        return None
    return max(1, int(quota) // int(period))
