"""One library that trains a case in turns, in its own process (see `harness`).

Never: runs while it has no turn.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bench.libraries.cases import BETA_1, BETA_2, CASES, EPSILON, FIT_ROWS, GUARD_EPOCHS, SEED, ImageCase
from bench.libraries.contenders import CONTENDERS, WHOLE_EPOCH, program_of
from bench.support.harness import Repeated, device, seconds, serve
from narrows.backends import Hyper, probe, resolve

FIT_SECONDS = 1.0
"""Least length of a timed fit, so that work done once has little weight."""

_BY_NAME = {case.name: case for case in CASES}


class Training:
    """One contender at one case."""

    def start(self, contender: str, case: str, threads: int) -> dict[str, Any]:
        """Prepare all variants, and keep the fastest one for the turns."""
        self.threads = threads
        # Only where the native backend runs and the process holds no other library.
        self.probes = contender == "narrows" and device() == "cpu" and probe("cpp").ok
        ways, losses = {}, {}
        self.steps = _BY_NAME[case].steps
        for name, begin in CONTENDERS[contender](_BY_NAME[case], threads):
            ways[name] = train = begin()
            losses[name] = [loss for _ in range(GUARD_EPOCHS) for loss in train(1)]
        self.ways = Repeated(ways)
        self.last = ways[self.ways.name]
        tried = {name: each / self.steps * 1e3 for name, each in self.ways.tried.items()}
        self.usual = min((name for name in tried if name not in WHOLE_EPOCH), key=lambda name: tried[name])
        return {"variant": self.ways.name, "usual": self.usual, "tried": tried, "losses": losses}

    def turn(self) -> dict[str, Any]:
        """Milliseconds of a step, and a probe of the machine at this moment."""
        answer: dict[str, Any] = {"ms": self.ways.turn() / self.steps * 1e3}
        usual = self.usual != self.ways.name
        answer["usual_ms"] = self.ways.turn(self.usual) / self.steps * 1e3 if usual else answer["ms"]
        if self.probes:
            from narrows.backends.cpp import probe_machine

            answer["probe"] = probe_machine(self.threads)
        return answer

    def end(self) -> float:
        """The last loss; it shows that training went on during the turns."""
        return self.last(1)[-1]


def fit(case: str, threads: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step in whole fits of the estimator, and in the compiled plan alone on the same data.

    A fit includes all that its user waits for: checks of X, first weights, shuffling, the history.
    """
    import narrows

    chosen = _BY_NAME[case]
    X = chosen.data(FIT_ROWS)
    steps = FIT_ROWS // chosen.batch
    program = program_of(chosen, resolve("auto"), threads)
    program.bind(X)
    order = np.random.default_rng(SEED).permutation(FIT_ROWS)

    def bare(epochs: int) -> None:
        for epoch in range(epochs):
            program.train(order, Hyper(SEED, epoch * steps, np.full(steps, chosen.learning_rate)))

    bare(1)
    epochs = max(2, math.ceil(FIT_SECONDS / min(seconds(lambda: bare(1)) for _ in range(3))))
    cls = narrows.ConvAutoencoder if isinstance(chosen, ImageCase) else narrows.Autoencoder
    estimator = cls(
        **chosen.layout,
        learning_rate_init=chosen.learning_rate,
        beta_1=BETA_1,
        beta_2=BETA_2,
        epsilon=EPSILON,
        batch_size=chosen.batch,
        max_iter=epochs,
        n_iter_no_change=epochs,
        early_stopping=False,
        random_state=SEED,
        precision=chosen.precision,
        n_threads=threads,
    )
    step_ms, fit_ms = [], []
    for _ in range(rounds):
        step_ms.append(seconds(lambda: bare(epochs)) / epochs / steps * 1e3)
        fit_ms.append(seconds(lambda: estimator.fit(X)) / epochs / steps * 1e3)
        if estimator.n_iter_ != epochs:
            raise RuntimeError(f"{case}: fit stopped after {estimator.n_iter_} of {epochs} epochs")
    # The losses on the same batches show that both trained the same network.
    estimator.set_params(shuffle=False, max_iter=GUARD_EPOCHS)
    losses = estimator.fit(chosen.data()).history_["loss"]
    return {"step_ms": step_ms, "fit_ms": fit_ms, "epochs": epochs, "losses": losses}


if __name__ == "__main__":
    training = Training()
    serve({"start": training.start, "turn": training.turn, "end": training.end, "fit": fit})
