"""Memory of a fit of the widest network, in a fresh process for each library (see `harness`)."""

from __future__ import annotations

from typing import Any

from bench.libraries.cases import CASES, FIT_ROWS, SEED, FloatArray
from bench.support.harness import serve

CASE = next(case for case in CASES if case.name == "hinton")
EPOCHS = 2


def narrows(threads: int) -> Any:
    from narrows import Autoencoder

    return Autoencoder(**CASE.layout, max_iter=EPOCHS, early_stopping=False, random_state=SEED, n_threads=threads).fit


def pytorch(threads: int) -> Any:
    import torch
    from torch import nn

    torch.set_num_threads(threads)

    def fit(X: FloatArray) -> None:
        modules: list[nn.Module] = []
        for n_in, n_out in zip(CASE.widths[:-1], CASE.widths[1:], strict=True):
            modules += [nn.Linear(n_in, n_out), nn.ReLU()]
        model, criterion = nn.Sequential(*modules[:-1]), nn.BCEWithLogitsLoss()
        adam = torch.optim.Adam(model.parameters(), lr=CASE.learning_rate, fused=True)
        data = torch.from_numpy(X)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(data)).split(CASE.batch):
                x = data[rows]
                adam.zero_grad()
                criterion(model(x), x).backward()
                adam.step()

    return fit


def status(field: str) -> float:
    """MiB of a memory figure that the kernel keeps for this process."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field + ":")) / 1024


def measure(library: str, threads: int) -> dict[str, float]:
    """MiB of the process before the fit, with library and data loaded, and at most."""
    fit = {"narrows": narrows, "pytorch": pytorch}[library](threads)
    X = CASE.data(FIT_ROWS)
    before = status("VmRSS")
    fit(X)
    return {"before": before, "peak": status("VmHWM"), "data": X.nbytes / 2**20}


if __name__ == "__main__":
    serve({"measure": measure})
