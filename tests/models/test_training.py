"""The training loop: resume to the bit, stopping, schedules, callbacks, divergence, Ctrl-C."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import tqdm

from narrows import Autoencoder
from narrows.backends import AUTO, probe, resolve
from narrows.data import ArraySource
from narrows.errors import DivergenceError, ModelFileError, ResumeError
from narrows.fitting.feed import even_batch
from narrows.training import (
    Block,
    Callback,
    Checkpoint,
    Interrupted,
    Options,
    Progress,
    Trainer,
    TrainingState,
)
from narrows.training.trainer import extended

BACKEND = resolve("auto") if any(probe(name).ok for name in AUTO) else "reference"
SMALL: dict[str, Any] = {
    "n_components": 3,
    "hidden_layer_sizes": 8,
    "batch_size": 16,
    "max_iter": 4,
    "n_threads": 1,
    "random_state": 0,
    "backend": BACKEND,
}


@pytest.fixture(scope="module")
def X() -> np.ndarray:
    rng = np.random.default_rng(1)
    return (rng.random((150, 3)) @ rng.random((3, 12))).astype(np.float32)


def small(**params: Any) -> Autoencoder:
    return Autoencoder(**(SMALL | params))


class Every(Callback):
    """Calls a function between chunks of steps."""

    def __init__(self, function: Callable[[Progress], Any]) -> None:
        self.function = function

    def on_batch(self, progress: Progress) -> None:
        self.function(progress)


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Callbacks, stop requests and checkpoints after every step."""
    monkeypatch.setattr("narrows.training.trainer.CHUNK_SECONDS", 0.0)


def comparable(ae: Autoencoder) -> dict[str, Any]:
    history = {name: values for name, values in ae.history_.items() if name != "seconds"}
    state = {name: array.tobytes() for name, array in ae._network.state.items()}
    return {"history": history, "state": state, "n_iter": ae.n_iter_, "step": ae._step, "best": ae.best_loss_}


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "last": {"early_stopping": False, "learning_rate": "cosine", "solver": "sgd", "learning_rate_init": 0.01},
    "plateau": {"learning_rate": "plateau", "n_iter_no_change": 4, "tol": 0.5},
    "noisy": {"corruption": "salt_and_pepper", "corruption_level": 0.2, "dropout": 0.2, "activity_l1": 0.1},
    "entropy": {"random_state": None},
}


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("blocks", [False, True], ids=["memory", "blocks"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_is_exact_wherever_it_stopped(variant: str, blocks: bool, X: np.ndarray, tmp_path: Path) -> None:
    params = VARIANTS[variant]
    data = ArraySource(X) if blocks else X
    bytes_ = {"block_bytes": 2000} if blocks else {}
    expected = None
    for stop_after in (*range(1, 13), 20, 27, 33):
        path = tmp_path / f"{stop_after}.ckpt"
        polls = itertools.count()
        stop = Checkpoint(path, stop=lambda polls=polls, k=stop_after: "tired" if next(polls) >= k else None)
        with pytest.raises(Interrupted) as raised:
            small(**params).fit(data, checkpoint=stop, **bytes_)
        assert raised.value.reason == "tired"
        ae = small(**params).fit(data, checkpoint=Checkpoint(path, resume="require"), **bytes_)
        if params.get("random_state", 0) is None:
            expected = comparable(small(random_state=ae._seed).fit(data, **bytes_))
        elif expected is None:
            expected = comparable(small(**params).fit(data, **bytes_))
        assert comparable(ae) == expected
        # A finished checkpoint gives the same estimator again, without training.
        assert comparable(small(**params).fit(data, checkpoint=Checkpoint(path), **bytes_)) == expected


@pytest.mark.usefixtures("short_chunks")
def test_resume_past_the_best_epoch(X: np.ndarray, tmp_path: Path) -> None:
    """Whose parameters are the result, whatever came behind it."""
    noise = np.random.default_rng(5).random((40, 12)).astype(np.float32)
    params = {"max_iter": 40, "n_iter_no_change": 3, "learning_rate_init": 0.03}
    whole = small(**params).fit(X, X_val=noise)
    best, steps = int(np.argmin(whole.history_["val_loss"])) + 1, whole._step // whole.n_iter_
    assert best < whole.n_iter_
    for stop_after in range(best * steps, whole._step, 3):
        path, polls = tmp_path / f"{stop_after}.ckpt", itertools.count()
        stop = Checkpoint(path, stop=lambda polls=polls, k=stop_after: "tired" if next(polls) >= k else None)
        with pytest.raises(Interrupted):
            small(**params).fit(X, X_val=noise, checkpoint=stop)
        resumed = small(**params).fit(X, X_val=noise, checkpoint=Checkpoint(path, resume="require"))
        assert comparable(resumed) == comparable(whole)


@pytest.mark.usefixtures("short_chunks")
def test_resume_step_by_step(X: np.ndarray, tmp_path: Path) -> None:
    """Stopped again and again after a step or two, a run still ends where it would have."""
    path = tmp_path / "c"
    n_runs = 0
    while True:
        n_runs += 1
        calls = itertools.count()
        stop = Checkpoint(path, stop=lambda calls=calls: "again" if next(calls) >= 2 else None)
        ae = small()
        try:
            ae.fit(X, checkpoint=stop)
        except Interrupted:
            continue
        break
    assert n_runs > 10
    assert comparable(ae) == comparable(small().fit(X))


def test_chunks_do_not_matter(X: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = comparable(small().fit(X))
    monkeypatch.setattr("narrows.training.trainer.CHUNK_SECONDS", 0.0)
    assert comparable(small().fit(X)) == expected


@pytest.mark.usefixtures("short_chunks")
def test_checkpoints_are_written_in_time(X: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "c"
    seen: list[bool] = []
    watch = Every(lambda p: seen.append(path.exists()))
    small(max_iter=1).fit(X, checkpoint=Checkpoint(path, minutes=0.0), callbacks=[watch])
    assert seen[0] is False
    assert all(seen[1:])
    path.unlink()
    seen.clear()
    small(max_iter=1).fit(X, checkpoint=Checkpoint(path), callbacks=[watch])
    assert not any(seen)
    assert path.exists()


def test_resume_refuses_another_run(X: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "c"
    small().fit(X, checkpoint=Checkpoint(path, identity={"input": "abc"}))
    here = Checkpoint(path, identity={"input": "abc"})

    def fit(ae: Autoencoder, D: np.ndarray = X, checkpoint: Checkpoint = here, **more: Any) -> None:
        ae.fit(D, checkpoint=checkpoint, **more)

    for call, field in [
        (lambda: fit(small(batch_size=32)), r"params.batch_size \(16 there, 32 here\)"),
        (lambda: fit(small(hidden_layer_sizes=(8, 4))), "params.hidden_layer_sizes"),
        (lambda: fit(small(random_state=1)), r"seed \(0 there, 1 here\)"),
        (lambda: fit(small(), X[:100]), "data.X.shape"),
        (lambda: fit(small(), X.astype(np.float64)), "data.X.dtype"),
        (lambda: fit(small(), X[::-1]), "data.X.sha256"),
        (lambda: fit(small(), sample_weight=np.ones(150)), "data.sample_weight.shape"),
        (lambda: fit(small(), X_val=X), "validation"),
        (lambda: fit(small(), checkpoint=Checkpoint(path, identity={"input": "xyz"})), "input"),
        (lambda: fit(small(), checkpoint=Checkpoint(path)), r"input \(abc there, unset here\)"),
    ]:
        with pytest.raises(ResumeError, match=field) as raised:
            call()
        assert "resume='never'" in str(raised.value)
    fit(small(verbose=0, n_threads=2))  # changes nothing that is computed
    fit(small(batch_size=32), checkpoint=Checkpoint(path, resume="never"))
    with pytest.raises(ResumeError, match="no checkpoint at"):
        fit(small(), checkpoint=Checkpoint(tmp_path / "absent", resume="require"))
    path.write_bytes(b"garbage")
    with pytest.raises(ModelFileError):
        fit(small())


def test_checkpoint_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="resume='maybe'"):
        Checkpoint(tmp_path, resume="maybe")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="minutes=-1"):
        Checkpoint(tmp_path, minutes=-1)


# --- stopping and schedules, on a program that does as it is told -------------------------------------------


@dataclasses.dataclass
class Scripted:
    """A program whose losses are given, one step an epoch."""

    losses: list[float]
    rates: list[float] = dataclasses.field(default_factory=list)
    plan: Any = dataclasses.field(default_factory=lambda: small().fit(np.eye(16)).plan_)

    def bind(self, *arrays: Any) -> None: ...

    def state(self, *, optimiser: bool = True) -> dict[str, np.ndarray]:
        return {slot.name: np.array([float(len(self.rates))]) for slot in self.plan.parameters}

    hand_over = views = state

    def finite(self) -> bool:
        return True

    def close(self) -> None: ...

    def train(self, rows: Any, hyper: Any, poll: Any = None) -> np.ndarray:
        self.rates += hyper.learning_rate.tolist()
        return np.array([[self.losses[len(self.rates) - 1]]])


class OneStep:
    n_rows, n_steps = 4, 1

    def blocks(self, epoch: int) -> Any:
        yield Block(np.arange(4), lambda: (None, None, None))


def scripted(losses: list[float], val: bool = False, **options: Any) -> Trainer:
    program: Any = Scripted([1.0] * len(losses) if val else losses)
    monitor = "val_loss" if val else "loss"
    trainer = Trainer(
        program,
        OneStep(),
        Options(**({"max_iter": len(losses), "seed": 0, "monitor": monitor} | options)),
        validate=(lambda p: losses[len(p.rates) - 1]) if val else None,
    )
    trainer.run()
    return trainer


@pytest.mark.parametrize("val", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e9])
def test_patience_is_relative(val: bool, scale: float) -> None:
    falling = [scale * 0.9**i for i in range(20)]
    assert scripted(falling, val, n_iter_no_change=3).state.epoch == 20
    flat = [scale * v for v in [3, 2, 1.99, 1.98, 1.97, 1.0, 1.0]]
    assert scripted(flat, val, n_iter_no_change=3, tol=0.1).state.epoch == 5
    # Slow progress adds up: measured from the last improvement, not from the epoch before.
    slow = [scale * 0.97**i for i in range(20)]
    assert scripted(slow, val, n_iter_no_change=5, tol=0.1).state.epoch == 20


def test_losses_at_and_below_zero() -> None:
    assert scripted([1.0, 0.0, 0.0, 0.0, 0.0], n_iter_no_change=2).state.epoch == 4
    assert scripted([-1.0, -2.0, -2.01, -2.02, -3.0], n_iter_no_change=2, tol=0.1).state.epoch == 4


def test_best_by_validation_and_last_by_loss() -> None:
    losses = [5.0, 3.0, 1.0, 2.0, 4.0]
    by_val = scripted(losses, val=True)
    assert by_val.state.best_epoch == 3
    kept = by_val.finish()
    assert kept is not None
    assert kept["W0"][0] == 3
    by_loss = scripted(losses)
    assert by_loss.state.finished == "max_iter"
    last = by_loss.finish()
    assert last is not None
    assert last["W0"][0] == 5


def test_an_exception_while_an_epoch_begins_keeps_the_last_one() -> None:
    """What an epoch has led to is copied before the next one's first step; until then the program has it."""

    class Interrupting(Scripted):
        def state(self, *, optimiser: bool = True) -> dict[str, np.ndarray]:
            if len(self.rates) == 2:
                raise KeyboardInterrupt
            return super().state()

        def hand_over(self) -> dict[str, np.ndarray]:
            return super().state()

    program: Any = Interrupting([3.0, 2.0, 1.0])
    trainer = Trainer(program, OneStep(), Options(max_iter=3, seed=0))
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert trainer.state.epoch == 2
    kept = trainer.finish()
    assert kept is not None
    assert kept["W0"][0] == 2


def test_schedules() -> None:
    def rates(losses: list[float], kind: str, **options: Any) -> list[float]:
        trainer: Any = scripted(losses, learning_rate=kind, learning_rate_init=1.0, monitor=None, **options)
        rates: list[float] = trainer.program.rates
        assert trainer.state.history["learning_rate"] == rates
        return rates

    assert rates([1.0] * 5, "constant") == [1.0] * 5
    np.testing.assert_allclose(rates([1.0] * 4, "cosine"), [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])
    assert rates([1.0] * 7, "plateau", n_iter_no_change=4) == [1, 1, 1, 0.5, 0.5, 0.25, 0.25]
    assert rates([1.0, 1.0, 0.5, 0.5, 0.5, 0.5], "plateau", n_iter_no_change=4) == [1, 1, 1, 1, 1, 0.5]


def test_cosine_without_early_stopping_runs_to_its_end(X: np.ndarray) -> None:
    params = {"early_stopping": False, "max_iter": 12, "n_iter_no_change": 1, "tol": 0.9}
    assert small(**params).fit(X).n_iter_ < 12
    assert small(**params, learning_rate="cosine").fit(X).n_iter_ == 12


def test_the_best_epoch_is_kept_to_the_bit(X: np.ndarray) -> None:
    """In training that goes on past it."""
    noise = np.random.default_rng(5).random((40, 12)).astype(np.float32)
    ae = small(max_iter=40, n_iter_no_change=3, learning_rate_init=0.03).fit(X, X_val=noise)
    best = int(np.argmin(ae.history_["val_loss"])) + 1
    assert best < ae.n_iter_
    shorter = small(max_iter=best, learning_rate_init=0.03).fit(X, X_val=noise)
    assert shorter.n_iter_ == best
    for kept, wanted in zip(ae.coefs_ + ae.intercepts_, shorter.coefs_ + shorter.intercepts_, strict=True):
        np.testing.assert_array_equal(kept, wanted)


def test_history_stays_in_step() -> None:
    history = extended({"loss": [1.0, 2.0]}, {"loss": 3.0, "val_loss": 4.0}, 2)
    assert history["loss"] == [1.0, 2.0, 3.0]
    assert np.isnan(history["val_loss"][:2]).all()
    assert math.isnan(extended(history, {"loss": 1.0}, 3)["val_loss"][3])


# --- callbacks ----------------------------------------------------------------------------------------------


def test_callbacks_are_told(X: np.ndarray) -> None:
    seen: list[tuple[str, Progress]] = []

    class Watch(Callback):
        def on_batch(self, progress: Progress) -> None:
            seen.append(("batch", progress))

        def on_epoch_end(self, progress: Progress) -> bool:
            seen.append(("epoch", progress))
            return progress.epoch == 2

    ae = small().fit(X, callbacks=[Watch()])
    epochs = [p for kind, p in seen if kind == "epoch"]
    assert [p.epoch for p in epochs] == [1, 2]
    assert [p.loss for p in epochs] == ae.history_["loss"]
    assert [p.val_loss for p in epochs] == ae.history_["val_loss"]
    assert epochs[0].steps_per_epoch == epochs[0].step == -(-135 // ae.plan_.batch_rows)
    last = [p for kind, p in seen if kind == "batch"][-1]
    assert last.epoch == 1
    assert last.step == last.steps_per_epoch
    assert last.loss == pytest.approx(ae.history_["loss"][-1], rel=1e-12)
    assert ae.n_iter_ == 2


def test_verbose_shows_a_bar_or_lines(X: np.ndarray, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """1: a bar where it can move, else lines; 2: lines. The bar ends, also if training fails."""
    small(max_iter=1).fit(X)
    assert capsys.readouterr() == ("", "")
    for verbose, terminal in ((1, False), (2, False), (2, True)):
        monkeypatch.setattr("sys.stderr.isatty", lambda terminal=terminal: terminal)
        small(verbose=verbose, max_iter=3).fit(X)
        out, err = capsys.readouterr()
        assert out.splitlines()[2].startswith("epoch 3/3  loss ")
        assert err == ""
    for verbose in (1, True, np.True_):
        small(verbose=verbose, max_iter=3).fit(X)
        out, err = capsys.readouterr()
        assert out == ""
        assert "3.0/3 epochs" in err
        assert f"loss {small(max_iter=3).fit(X).history_['loss'][-1]:.5g}" in err
        assert err.endswith("\n")
    with pytest.raises(ZeroDivisionError):
        small(verbose=1).fit(X, callbacks=[lambda progress: 1 / 0])
    assert capsys.readouterr().err.endswith("\n")
    with pytest.raises(TypeError, match="verbose=-1 must be 0"):
        small(verbose=-1).fit(X)


@pytest.mark.parametrize("widgets", [True, False])
def test_a_notebook_shows_a_bar(X: np.ndarray, widgets: bool, monkeypatch: Any, capsys: Any) -> None:
    """tqdm decides between a widget and text; without ipywidgets it would warn."""

    class Kernel:
        def __init__(self) -> None:
            self.config: dict[str, Any] = {"IPKernelApp": {}}

    class Widget(tqdm.tqdm):
        made = 0

        def __init__(self, *args: Any, **params: Any) -> None:
            Widget.made += 1
            super().__init__(*args, **params)

    notebook = type(os)("IPython")
    notebook.get_ipython = Kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    monkeypatch.delitem(sys.modules, "tqdm.auto", raising=False)
    if widgets:
        automatic = type(os)("tqdm.auto")
        automatic.tqdm = Widget  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "tqdm.auto", automatic)
    small(verbose=1, max_iter=2).fit(X)
    assert "2.0/2 epochs" in capsys.readouterr().err
    assert Widget.made == widgets


def test_callbacks_may_be_functions(X: np.ndarray) -> None:
    seen: list[Progress] = []
    ae = small(max_iter=4).fit(X, callbacks=[seen.append, lambda progress: progress.epoch == 2])
    assert [progress.epoch for progress in seen] == [1, 2]
    assert ae.n_iter_ == 2
    assert small(max_iter=3).fit(X, callbacks=lambda progress: "no boolean").n_iter_ == 3  # type: ignore[arg-type]
    for wrong in ([3], 3, [Callback], "lines", [None]):
        with pytest.raises(TypeError, match=r"callbacks: .* must be a narrows\.training\.Callback or a function"):
            small().fit(X, callbacks=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("params", [{}, {"early_stopping": False}, {"learning_rate_init": 0.3}])
def test_progress_gives_the_model_of_its_moment(X: np.ndarray, params: dict[str, Any]) -> None:
    """After each epoch, that of a fit that ends there. Neither training nor the estimator changes."""
    found: list[Autoencoder] = []
    first: list[Any] = []
    ae = small(max_iter=3, **params)

    def between(progress: Progress) -> None:
        first.append((progress.model.transform(X), progress.model.n_iter_))

    ae.fit(X, callbacks=[Every(between), lambda progress: found.append(progress.model)])
    alone = small(max_iter=3, **params).fit(X)
    np.testing.assert_array_equal(ae.transform(X), alone.transform(X))
    assert first[0][0].shape == (150, 3)
    assert first[0][1] == 0
    for epochs, model in enumerate(found, start=1):
        shorter = small(max_iter=epochs, early_stopping=False, **({k: v for k, v in params.items() if "rate" in k}))
        if params.get("early_stopping", True) is False:
            np.testing.assert_array_equal(model.transform(X), shorter.fit(X).transform(X))
        assert model.n_iter_ == epochs
        assert model.history_["loss"] == ae.history_["loss"][:epochs]
        assert model.get_params() == ae.get_params()
    assert (found[0].transform(X) != found[1].transform(X)).any()
    with pytest.raises(AttributeError):
        _ = Progress(0, 1, 0, 1, 0.0, None, 0.0, 0.1, 0).model


def test_an_exception_in_a_callback_leaves_whole_epochs(X: np.ndarray) -> None:
    class Fails(Callback):
        def on_epoch_end(self, progress: Progress) -> None:
            if progress.epoch == 3:
                raise ZeroDivisionError

    ae = small(early_stopping=False)
    with pytest.raises(ZeroDivisionError):
        ae.fit(X, callbacks=[Fails()])
    assert ae.n_iter_ == 3
    assert (ae.transform(X) == small(early_stopping=False, max_iter=3).fit(X).transform(X)).all()


# --- divergence and Ctrl-C ----------------------------------------------------------------------------------


def test_divergence_keeps_the_last_good_epoch(X: np.ndarray) -> None:
    ae = small(solver="sgd", learning_rate_init=1e-3, early_stopping=False, warm_start=True).fit(X)
    before = ae.transform(X)
    with pytest.raises(DivergenceError, match=r"diverged in epoch 1.*lower learning_rate_init") as raised:
        ae.set_params(learning_rate_init=1e30).fit(X)
    assert "\n" not in str(raised.value)
    assert (ae.transform(X) == before).all()


@pytest.mark.usefixtures("short_chunks")
def test_divergence_in_a_later_epoch(X: np.ndarray, tmp_path: Path) -> None:
    """Squared errors of growing weights: a rate just too large takes some epochs to overflow."""
    for rate in np.geomspace(0.02, 3, 30):
        ae = small(
            solver="sgd",
            momentum=0.0,
            learning_rate_init=rate,
            activation="linear",
            batch_size=150,
            early_stopping=False,
            max_iter=60,
        )
        message = ""
        try:
            ae.fit(X, checkpoint=Checkpoint(tmp_path / "c", resume="never"))
        except DivergenceError as error:
            message = str(error)
        if "no epoch" in message:
            with pytest.raises(AttributeError, match="not fitted"):
                ae.coefs_  # noqa: B018
        elif message:
            assert f"the parameters after epoch {ae.n_iter_} are kept" in message
            assert all(np.isfinite(W).all() for W in ae.coefs_ + ae.intercepts_)
            assert len(ae.history_["loss"]) == ae.n_iter_
            return
    pytest.fail("no rate made training diverge after an epoch")


@pytest.mark.usefixtures("short_chunks")
def test_ctrl_c_leaves_whole_epochs_and_a_checkpoint(X: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "c"

    def interrupt(progress: Progress) -> None:
        if progress.epoch == 2 and progress.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    ae = small(early_stopping=False)
    with pytest.raises(KeyboardInterrupt):
        ae.fit(X, callbacks=[Every(interrupt)], checkpoint=Checkpoint(path))
    assert ae.n_iter_ == 2
    assert (ae.transform(X) == small(early_stopping=False, max_iter=2).fit(X).transform(X)).all()
    again = small(early_stopping=False).fit(X, checkpoint=Checkpoint(path, resume="require"))
    assert comparable(again) == comparable(small(early_stopping=False).fit(X))
    unfitted = small()
    with pytest.raises(KeyboardInterrupt):
        unfitted.fit(X, callbacks=[Every(lambda p: os.kill(os.getpid(), signal.SIGINT))])
    assert not hasattr(unfitted, "coefs_")
    assert not hasattr(unfitted, "n_features_in_")


@pytest.mark.usefixtures("short_chunks")
def test_an_optimiser_that_starts_afresh_corrects_its_averages(X: np.ndarray) -> None:
    """Interrupted in an epoch, a run goes on from the last whole one: with Adam's first step no longer than any first
    step, although many were made before."""

    def interrupt(progress: Progress) -> None:
        if progress.epoch == 30 and progress.step == 2:
            raise KeyboardInterrupt

    params = {"early_stopping": False, "batch_size": 150, "n_iter_no_change": 1000, "learning_rate_init": 1e-3}
    for rows, stop in ((np.repeat(X, 3, axis=0), interrupt), (X, None)):
        ae = small(**params, max_iter=31, warm_start=True)
        if stop is None:
            ae.set_params(solver="sgd").fit(rows).set_params(solver="adam")
        else:
            with pytest.raises(KeyboardInterrupt):
                ae.fit(rows, callbacks=[Every(stop)])
            assert ae.n_iter_ == 30
        before = [array.copy() for array in ae.coefs_ + ae.intercepts_]
        ae.set_params(max_iter=1).fit(X)
        moved = max(abs(a - b).max() for a, b in zip(ae.coefs_ + ae.intercepts_, before, strict=True))
        assert 0.9e-3 < moved < 1.01e-3


@pytest.mark.usefixtures("short_chunks")
def test_an_interruption_that_is_not_held_back_spoils_no_checkpoint(tmp_path: Path) -> None:
    """A handler of somebody else's may raise inside the steps: how many were done is then unknown."""

    class Careless(Scripted):
        def train(self, rows: Any, hyper: Any, poll: Any = None) -> np.ndarray:
            terms = super().train(rows, hyper, poll)
            if len(self.rates) == 3:
                raise KeyboardInterrupt
            return terms

    path = tmp_path / "c"
    program: Any = Careless([3.0, 2.0, 1.0])
    trainer = Trainer(program, OneStep(), Options(max_iter=3, seed=0), checkpoint=Checkpoint(path, minutes=0))
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    saved = Checkpoint(path).read()
    assert saved is not None
    assert saved.state.step == saved.network["W0"][0] == 2
    kept = trainer.finish()
    assert kept is not None
    assert kept["W0"][0] == 2


@pytest.mark.parametrize("delay", [0.05, 0.11, 0.23, 0.31])
def test_ctrl_c_inside_the_steps(delay: float, tmp_path: Path) -> None:
    """However the signal falls, the checkpoint holds a whole number of steps that lead to the same end."""
    big = np.random.default_rng(0).random((3000, 60)).astype(np.float32)
    params = {
        "hidden_layer_sizes": 64,
        "max_iter": 10**6,
        "early_stopping": False,
        "tol": 0.0,
        "n_iter_no_change": 10**6,
    }
    path = tmp_path / "c"
    timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    ae = small(**params)
    with pytest.raises(KeyboardInterrupt):
        ae.fit(big, checkpoint=Checkpoint(path))
    late = time.perf_counter()
    timer.join()
    assert time.perf_counter() - late < 1
    saved = Checkpoint(path).read()
    assert saved is not None
    assert isinstance(saved.state, TrainingState)
    per_epoch = 3000 // even_batch(3000, 16)
    assert saved.state.step == saved.state.epoch * per_epoch + saved.state.epoch_step
    if BACKEND != "reference":
        twin = small(**(params | {"max_iter": saved.state.epoch + 1})).fit(big)
        stop_at = saved.state.epoch + 1

        class Stop(Callback):
            def on_epoch_end(self, progress: Progress) -> bool:
                return progress.epoch == stop_at

        resumed = small(**params).fit(big, checkpoint=Checkpoint(path), callbacks=[Stop()])
        assert comparable(resumed)["state"] == comparable(twin)["state"]
        assert comparable(resumed)["history"] == comparable(twin)["history"]


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_in_order_a_source_is_trained_on_as_the_array(form: str, X: np.ndarray) -> None:
    """Blocks are whole batches, so without shuffling it makes no difference where the rows lie."""
    data: Any = sp.csr_array(X * (np.median(X) < X)) if form == "sparse" else X
    params: dict[str, Any] = {"shuffle": False, "early_stopping": False}
    expected = comparable(small(**params).fit(data))
    for block_bytes in (1000, 3000, 1 << 20):
        assert comparable(small(**params).fit(ArraySource(data), block_bytes=block_bytes)) == expected


@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_shuffled_by_blocks_a_source_is_trained_on_as_the_array(form: str, early_stopping: bool, X: np.ndarray) -> None:
    data: Any = sp.csr_array(X * (np.median(X) < X)) if form == "sparse" else X
    params: dict[str, Any] = {"shuffle": "blocks", "early_stopping": early_stopping}
    found = []
    for block_bytes in (3000, 10_000, 1 << 20):
        expected = comparable(small(**params).fit(data, block_bytes=block_bytes))
        assert comparable(small(**params).fit(ArraySource(data), block_bytes=block_bytes)) == expected
        found.append(expected["state"])
    assert found[0] != found[1]
    with pytest.raises(TypeError, match="shuffle='rows' must be True, False or 'blocks'"):
        small(shuffle="rows").fit(X)
