"""The process of the command: failing streams and signals at any moment change neither results nor exit codes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

from cli_runs import SMALL, narrows

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="descriptors and signals of Linux")

FIT = [a for a in SMALL if a != "--quiet"]
HOOK = """
import os, signal, sys
from narrows.__main__ import run
at = sys.argv.pop(1)
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == at:
            sys.meta_path.remove(self)
            {action}
sys.meta_path.insert(0, Finder())
run()
"""


def shell(commands: list[str], **environment: str) -> list[tuple[int, str]]:
    """Run commands with redirections at the same time: `$n` is narrows. Return their exit codes and errors."""
    started = [
        subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", f'n="{sys.executable} -m narrows"; {command}'],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment,
        )
        for command in commands
    ]  # fmt: skip
    errors = [process.communicate(timeout=120)[1] for process in started]
    return [(process.returncode, error) for process, error in zip(started, errors, strict=True)]


def test_a_fit_ends_whatever_its_streams_do(npy, tmp_path):
    """A reader that is gone, a full disk, closed descriptors: the same files, and exit 0 with ``_SUCCESS``."""
    assert narrows("fit", npy, "--out", tmp_path / "plain", *SMALL) == 0
    expected = (tmp_path / "plain" / "latent.npy").read_bytes()
    streams = ("2>&1 | head -1", "2>&-", ">&- 2>&- <&-", ">/dev/full 2>/dev/full")
    fits = [f"$n fit {npy} --out {tmp_path}/{i} {' '.join(FIT)} {text}" for i, text in enumerate(streams)]
    for i, (code, errors) in enumerate(shell(fits, PYTHONFAULTHANDLER="1", PYTHONWARNINGS="always")):
        out = tmp_path / str(i)
        assert code == 0, (streams[i], errors)
        assert (out / "_SUCCESS").exists(), streams
        assert (out / "latent.npy").read_bytes() == expected, streams
        log = (out / "run.log").read_text()
        assert re.match(r"# narrows fit: log\n(\d{4}-.* (DEBUG|INFO) .*\n)+$", log), "messages of others are in run.log"


def test_a_bar_on_a_terminal_that_goes_away_stops_nobody(npy, tmp_path):
    """The terminal of a lost connection: writes fail with EIO."""
    master, slave = os.openpty()
    command = [sys.executable, "-m", "narrows", "fit", str(npy), "--out", str(tmp_path / "o"), *FIT]
    process = subprocess.Popen(command, stdout=slave, stderr=slave)
    os.close(slave)
    os.close(master)
    assert process.wait(timeout=120) == 0
    assert (tmp_path / "o" / "_SUCCESS").exists()


def test_lost_output_is_an_error_only_if_it_is_all_that_a_command_makes(npy, tmp_path):
    assert narrows("fit", npy, "--out", tmp_path / "o", *SMALL) == 0
    lost = ["$n doctor >/dev/full", "$n --help >&-", f"$n fit {npy} --out {tmp_path}/new --dry-run >/dev/full"]
    for code, errors in shell(lost):
        assert code == 3
        assert errors.startswith("narrows: error: cannot write to standard output: ")
        assert errors.count("\n") == 1
    made = [f"cd {tmp_path}; $n {c} --quiet >/dev/full 2>&-" for c in ("report o", "encode o x.npy -o z.npy")]
    assert shell(["$n --help | head -0", *made]) == [(0, "")] * 3
    assert (tmp_path / "z.npy").read_bytes() == (tmp_path / "o" / "latent.npy").read_bytes()


def test_a_log_that_cannot_grow_is_one_warning(npy, tmp_path, capsys):
    out = tmp_path / "o"
    assert narrows("fit", npy, "--out", out, *SMALL) == 0
    (out / "run.log").unlink()
    (out / "run.log").symlink_to("/dev/full")
    (out / "_SUCCESS").unlink()
    capsys.readouterr()
    assert narrows("fit", npy, "--out", out, *SMALL) == 0
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "run.log is not complete: [Errno 28] No space left on device" in errors
    assert (out / "_SUCCESS").exists()


def hooked(action: str, at: str, *args: object) -> subprocess.CompletedProcess[str]:
    """Run the command, with `action` when the module `at` is first imported."""
    command = [sys.executable, "-c", HOOK.format(action=action), at, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


KILL = "os.kill(os.getpid(), signal.{})"
SWALLOWED = "exec('class D:\\n def __del__(self): os.kill(os.getpid(), signal.{})', globals()); D()"


@pytest.mark.parametrize(
    ("name", "at", "action"),
    [
        ("SIGTERM", "numpy", KILL),  # before the job
        ("SIGHUP", "narrows._core", KILL),  # inside the initialisation of the extension
        ("SIGINT", "sklearn", KILL),
        ("SIGUSR1", "jinja2", "try: " + KILL + "\n            except BaseException: raise ImportError"),
        ("SIGUSR2", "jinja2", SWALLOWED),
    ],
)
def test_a_signal_during_imports_is_a_stop(name, at, action, npy, tmp_path):
    """Also where a library swallows the exception of the signal, or makes an ImportError of it."""
    done = hooked(action.format(name), at, "fit", npy, "--out", tmp_path / "o", *SMALL)
    lines = [text for text in done.stderr.splitlines() if text.startswith("narrows: ")]
    assert (done.returncode, done.stdout) == (128 + getattr(signal, name), ""), done
    assert sum(f"stopped by {name}" in text for text in lines) == 1, lines
    assert not (tmp_path / "o" / "_SUCCESS").exists()
    assert action is SWALLOWED or done.stderr.count("\n") <= 2


PROCESS = """
import atexit, os, signal, sys, threading, time
from narrows import _process
name, when, code = sys.argv[1:]
kill = lambda: os.kill(os.getpid(), getattr(signal, name))
def main():
    if when == "before": kill()
    if when == "after": atexit.register(kill)
    if when == "daemon":
        threading.Thread(target=lambda: [time.sleep(1e-4) for _ in range(10**6)], daemon=True).start()
    return int(code)
_process.run(main)
"""


def test_signals_before_and_after_the_job_and_under_nohup():
    def run(*args: str, nohup: bool = False) -> tuple[int, str]:
        ignore = (lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) if nohup else None
        done = subprocess.run(
            [sys.executable, "-c", PROCESS, *args], capture_output=True, text=True, timeout=60, preexec_fn=ignore
        )
        return done.returncode, done.stderr

    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"):
        stopped = 128 + getattr(signal, name)
        assert run(name, "before", "0") == (stopped, f"narrows: stopped by {name}\n")
    assert run("SIGUSR2", "after", "0") == (140, "narrows: stopped by SIGUSR2 after the end of the job\n")
    assert run("SIGTERM", "after", "3") == (3, "")  # the error has its own line
    assert run("SIGHUP", "before", "0", nohup=True) == (0, "")
    assert run("SIGTERM", "daemon", "4") == (4, "")
