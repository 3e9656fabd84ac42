"""``narrows bench`` and what it formats: the table, the file, the refusals; nothing here asserts on seconds."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from cases import CASES as NETWORKS
from cli_runs import narrows
from narrows import benchmark
from narrows.backends import AUTO, Probe, probe
from narrows.benchmark import CASES, prepared
from narrows.machine import usable_cpus
from narrows.plan.ops import OpCode
from narrows.plan.plan import Mode, op_flops

QUICK = ("--seconds", "0", "--threads", "1")
ABLE = [name for name in AUTO if probe(name).ok]


def rows_of(text: str, head: str) -> list[list[str]]:
    """The words of each row of the table whose heading begins with `head`."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:1] == [head]) + 1
    return [line.split() for line in lines[start : [*lines, ""].index("", start)]]


@pytest.fixture
def no_compiler(monkeypatch):
    """As on a node where the extension could not be built."""
    from narrows.backends import cpp

    monkeypatch.setattr(cpp, "probe", lambda: Probe(False, "not built"))
    monkeypatch.delenv("NARROWS_BACKEND", raising=False)


@pytest.fixture
def not_forced(monkeypatch):
    monkeypatch.delenv("NARROWS_BACKEND", raising=False)


def test_a_row_for_each_case_and_backend(not_forced, capsys):
    assert narrows("bench", *QUICK, "--cases", "tabular,keras-deep-32", "--quiet") == 0
    out = capsys.readouterr().out
    rows = rows_of(out, "case")
    assert [row[:2] for row in rows] == [[case, name] for case in ("tabular", "keras-deep-32") for name in ABLE]
    assert all(float(row[2]) > 0 for row in rows)
    last = out.splitlines()[-1]
    assert last.startswith("machine: multiply-add peak ") == ("cpp" in ABLE)
    assert "exchange" not in last, "one thread has nobody to exchange with"


def test_json_holds_what_the_table_shows(cpp, tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert narrows("bench", *QUICK, "--cases", "tabular", "--backend", "cpp", "--json", path) == 0
    out, err = capsys.readouterr()
    assert str(path) in err
    report = json.loads(path.read_text())
    assert report.keys() == {"narrows", "date", "machine", "threads", "threads_from", "backends", "steps", "ops"}
    assert report["machine"].keys() == {"cpu", "isa", "cores", "system", "python"}
    assert (report["threads"], list(report["backends"]), report["ops"]) == (1, ["cpp"], [])
    (t,) = report["steps"]
    assert t.keys() == {
        "case", "backend", "threads", "rounds", "steps", "ms", "ms_q1", "ms_q3", "examples_per_s", "gflop",
        "gflop_per_s", "machine", "floor_ms", "peak_share", "generic_ops",
    }  # fmt: skip
    assert t["rounds"] >= 3
    assert 0 < t["ms_q1"] <= t["ms"] <= t["ms_q3"]
    assert t["gflop"] == pytest.approx((4 * 30 * 16 + 6 * (16 * 8 + 8 * 16 + 16 * 30)) * 128 / 1e9)
    assert t["examples_per_s"] == pytest.approx(128 / t["ms"] * 1e3)
    assert t["gflop_per_s"] == pytest.approx(t["gflop"] / t["ms"] * 1e3)
    assert t["machine"].keys() == {"fma_gflops", "exchange_gb_s", "barrier_us"}
    assert t["floor_ms"] == pytest.approx(t["gflop"] / t["machine"]["fma_gflops"] * 1e3)
    assert t["peak_share"] == pytest.approx(t["floor_ms"] / t["ms"])
    (row,) = rows_of(out, "case")
    assert float(row[2]) == pytest.approx(t["ms"], rel=0.01)
    assert float(row[-2]) == pytest.approx(t["floor_ms"], rel=0.01)


def test_without_a_compiler_there_is_no_floor(no_compiler, tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert narrows("bench", *QUICK, "--cases", "tabular", "--json", path, "--quiet") == 0
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert "not built" in err
    assert "floor" in err
    assert [row[-2:] for row in rows_of(out, "case")] == [["-", "-"]]
    assert "machine:" not in out
    (t,) = json.loads(path.read_text())["steps"]
    assert (t["backend"], t["machine"], t["floor_ms"], t["peak_share"]) == ("numba", None, None, None)
    assert t["generic_ops"]


def test_ops_add_up_to_the_step(cpp, tmp_path, capsys):
    path = tmp_path / "ops.json"
    assert narrows("bench", *QUICK, "--ops", "keras-deep-32", "--json", path, "--quiet") == 0
    out = capsys.readouterr().out
    report = json.loads(path.read_text())
    assert [t["case"] for t in report["steps"]] == ["keras-deep-32"]
    plan = next(c for c in CASES if c.name == "keras-deep-32").plan()
    assert [t["op"] for t in report["ops"]] == [
        *(op.code.name.lower() for op in plan.ops if op.modes & Mode.TRAIN),
        "waiting",
    ]
    assert sum(t["share"] for t in report["ops"]) == pytest.approx(1)
    for t in report["ops"]:
        assert t.keys() == {"op", "operands", "size", "ms", "share", "gflop_per_s"}
        assert (t["gflop_per_s"] is not None) == (t["op"] in ("dense", "dgrad", "wgrad_update"))
        if t["gflop_per_s"] is not None:
            m, n_in, n_out = map(int, t["size"].split(" x "))
            assert t["gflop_per_s"] == pytest.approx(2 * m * n_in * n_out / t["ms"] / 1e6)
    table = rows_of(out, "op")
    assert any(" ".join(row).startswith("dense a0 <- x W0 b0 32 x 784 x 128 ") for row in table)
    assert [row[0] for row in table] == [*(t["op"] for t in report["ops"]), "step"]


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["--cases", "tabular,mnist"], 2, "--cases: 'mnist' is not one of keras-simple, keras-deep,"),
        (["--cases", ""], 2, "--cases: '' is not one of"),
        (["--ops", "mnist"], 2, "--ops: 'mnist' is not one of"),
        (["--ops", "tabular", "--cases", "tabular"], 2, "not allowed with"),
        (["--ops", "tabular", "--backend", "numba"], 2, "leave out --backend numba"),
        (["--backend", "abacus"], 2, "abacus"),
        (["--seconds", "-1"], 2, "--seconds"),
        (["--threads", "0"], 2, "--threads"),
        (["--json", "bench.txt"], 3, "bench.txt"),
        (["--json", "missing/bench.json"], 3, "missing"),
    ],
)
def test_refusals(args, code, text, tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    assert narrows("bench", *args) == code
    assert text in line()
    assert list(tmp_path.iterdir()) == []


def test_refusals_of_the_environment(monkeypatch, no_compiler, line):
    assert narrows("bench", "--backend", "cpp") == 6
    assert "not built" in line()
    assert narrows("bench", "--ops", "tabular") == 6
    assert "not built" in line()
    monkeypatch.setenv("NARROWS_BACKEND", "abacus")
    assert narrows("bench") == 2
    assert "abacus" in line()
    monkeypatch.setenv("NARROWS_NUM_THREADS", "some")
    assert narrows("bench") == 2
    assert "NARROWS_NUM_THREADS" in line()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_middle_leaves_one_line(number, code, tmp_path):
    path = tmp_path / "bench.json"
    command = [sys.executable, "-m", "narrows", "bench", "--cases", "hinton", "--backend", ABLE[0], "--threads", "1"]
    with subprocess.Popen(
        [*command, "--seconds", "100", "--json", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            while not process.stdout.readline().startswith("case "):
                assert process.poll() is None
            time.sleep(0.5)  # into the rounds
            process.send_signal(number)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == code, err
    assert [x for x in err.splitlines() if "warning" not in x] == [f"narrows: stopped by {number.name}"]
    assert not path.exists()


def test_more_threads_than_cpus_are_said(cpp, capsys, monkeypatch):
    asked = []
    real = benchmark._probe_machine

    def counted(n_threads):
        asked.append(n_threads)
        return real(1)

    monkeypatch.setattr(benchmark, "_probe_machine", counted)
    n = usable_cpus()[0] + 1
    args = ["bench", "--cases", "tabular", "--backend", "cpp", "--seconds", "0", "--threads", n, "--quiet"]
    assert narrows(*args) == 0
    assert f"{n} threads on {n - 1} CPUs" in capsys.readouterr().err
    assert asked == [n, n]


# --- what is measured -------------------------------------------------------------------------------------


def multiply_adds(layer):
    """Of a row; every tap of a kernel counts at every place it is put."""
    conv = layer.convolution
    if conv is None:
        return layer.n_in * layer.n_out
    height, width = conv.shape[:2] if conv.transposed else conv.size
    return height * width * math.prod(conv.kernel) * conv.shape[2] * conv.filters


def test_products_of_the_ops_are_the_work_of_the_plan():
    for case in NETWORKS:
        check_work(case)


def check_work(case):
    for mode in (Mode.GRADIENT, Mode.TRAIN):
        assert sum(op_flops(case.plan, op) for op in case.plan.ops if op.modes & mode) == case.plan.flops, case
    layers = [multiply_adds(layer) for layer in case.spec.layers]
    gibbs, penalties = case.spec.training.gibbs, case.spec.training.penalties
    if gibbs is not None:
        # Up, two in each Gibbs step, two for the gradient; chains that go on rebuild no row, so that is one more.
        products = 1 + 2 * gibbs.n_steps + 2 + (gibbs.n_chains > 0)
        assert case.plan.flops == 2 * case.batch * products * layers[0], case
    elif penalties.contractive == penalties.contractive_hessian == 0:
        work = 3 * sum(layers) - layers[0]
        # Products with sparse rows depend on the data.
        if case.spec.form.sparse_input:
            work -= 2 * layers[0]
        grams = 0
        if case.spec.latent < len(layers) - case.spec.form.gram_decoder:  # The gradient by the batches is nobody's.
            work -= case.spec.data.n_conditions * case.spec.layers[case.spec.latent].n_out
        if case.spec.form.gram_decoder:
            work -= 3 * layers[-1]
            last = case.spec.layers[-1]
            grams = (last.n_in + 1) ** 2 * (2 * last.n_out + case.batch)
        assert case.plan.flops == 2 * (case.batch * work + grams), case
    assert all(op_flops(case.plan, op) == 0 for op in case.plan.ops if op.code is OpCode.LOSS), case


def test_rounds_are_alike(monkeypatch):
    """Every round trains the same number of steps, after enough of them to be measured, and three at least."""
    monkeypatch.setattr(benchmark, "ROUND_SECONDS", 0.0)
    calls = []

    def run(n):
        calls.append(n)
        return len(calls)

    steps, rounds = benchmark._rounds(run, 0.0)
    assert steps == 1
    assert calls == [1, 1, 1, 1, 1]
    assert rounds == [3, 4, 5]
    monkeypatch.setattr(benchmark, "ROUND_SECONDS", 1e9)
    calls.clear()
    steps, rounds = benchmark._rounds(run, 0.0)
    warm = calls[1 : -len(rounds)]
    assert steps == benchmark.MAX_STEPS == warm[-1]
    assert all(b == min(2 * a, steps) for a, b in pairwise(warm))


def test_every_round_starts_from_the_same_parameters(monkeypatch):
    losses = []
    real = benchmark.compile_plan

    def spied(*args, **options):
        program = real(*args, **options)
        train = program.train
        program.train = lambda rows, hyper: losses.append((len(hyper.learning_rate), train(rows, hyper)[:, 0]))
        return program

    monkeypatch.setattr(benchmark, "compile_plan", spied)
    timing = benchmark.time_steps(CASES[-1], "numba", n_threads=1, seconds=0)
    rounds = [loss for n, loss in losses if n == timing.steps][-timing.rounds :]
    assert len(rounds) == timing.rounds
    for other in rounds[1:]:
        np.testing.assert_array_equal(other, rounds[0])


def test_the_page_lists_the_cases():
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    for case, before in zip(CASES, (None, *CASES), strict=False):
        same = before is not None and case.widths == before.widths
        widths = "the same" if same else "-".join(map(str, case.widths))
        assert f"| `{case.name}` | {widths} | {case.batch} | {case.loss.name.lower()} |" in page


@pytest.mark.parametrize("steps", [1, 20, 45])
def test_prepared_steps_go_round_the_batches(steps):
    case = CASES[-1]
    program, rows, hyper = prepared(case, "numba", 1, steps)
    assert len(rows) == steps * case.batch
    assert len(hyper.learning_rate) == steps
    assert len(np.unique(rows)) == min(steps, benchmark.BATCHES) * case.batch
    assert program.train(rows, hyper).shape == (steps, 1)
