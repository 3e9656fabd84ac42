"""What follows the progress of training: callbacks, a bar, lines.

Nothing here changes a result, except that a callback may end training after an epoch.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TextIO

__all__ = ["Callback", "EpochPrinter", "Progress", "ProgressBar", "as_callbacks", "losses_text", "shown"]


@dataclass(frozen=True)
class Progress:
    """How far training is.

    Attributes
    ----------
    epoch : int
        Epochs completed by this call of fit.
    max_iter : int
    step : int
        Steps of the current epoch, or of the epoch that just ended.
    steps_per_epoch : int
    loss : float
        Mean loss of the epoch's rows so far, without penalties.
    val_loss : float or None
        Validation loss of the last completed epoch.
    seconds : float
        Time since this process began to train.
    learning_rate : float
        Learning rate of the last step.
    best_epoch : int
        The epoch (from 1) with the lowest monitored loss; 0 before the first ends.

    Examples
    --------
    >>> import numpy as np
    >>> from narrows import Autoencoder
    >>> X = np.random.default_rng(0).normal(size=(60, 8))
    >>> shapes = []
    >>> fit = Autoencoder(2, max_iter=2).fit(X, callbacks=[lambda p: shapes.append(p.model.transform(X).shape)])
    >>> shapes
    [(60, 2), (60, 2)]
    """

    epoch: int
    max_iter: int
    step: int
    steps_per_epoch: int
    loss: float
    val_loss: float | None
    seconds: float
    learning_rate: float
    best_epoch: int
    _snapshot: Callable[[], Any] | None = field(default=None, repr=False, compare=False)

    @property
    def model(self) -> Any:
        """The estimator as it is at this moment: a copy with the present parameters, which training does not change.

        Read it during the callback. Later it would have later parameters.
        """
        if self._snapshot is None:
            raise AttributeError("this progress belongs to no estimator")
        return self._snapshot()


class Callback:
    """Follows the progress of training; override one method or both.

    Examples
    --------
    >>> import numpy as np
    >>> from narrows import Autoencoder
    >>> from narrows.training import Callback
    >>> class Enough(Callback):
    ...     def on_epoch_end(self, progress):
    ...         return progress.epoch == 2
    >>> X = np.random.default_rng(0).normal(size=(60, 8))
    >>> Autoencoder(2, random_state=0).fit(X, callbacks=[Enough()]).n_iter_
    2
    """

    def on_batch(self, progress: Progress) -> None:
        """Called between steps: at least once in an epoch, and about four times a second."""

    def on_epoch_end(self, progress: Progress) -> bool | None:
        """Called after each epoch; True ends training, as convergence does."""
        return None


class _Function(Callback):
    """A function that is called after each epoch."""

    def __init__(self, function: Callable[[Progress], Any]) -> None:
        self._function = function

    def on_epoch_end(self, progress: Progress) -> bool | None:
        # Only True ends training: a function that returns its list or its figure does not.
        return self._function(progress) is True


def as_callbacks(given: Any) -> list[Callback]:
    """Callbacks from objects and functions, or from a single one.

    Raises
    ------
    TypeError
        One of them is neither a `Callback` nor a function.
    """
    single = callable(given) or hasattr(given, "on_epoch_end") or not isinstance(given, Iterable)
    found: list[Callback] = []
    for each in [given] if single else given:
        if not isinstance(each, type) and hasattr(each, "on_batch") and hasattr(each, "on_epoch_end"):
            found.append(each)
        elif callable(each) and not isinstance(each, type):
            found.append(_Function(each))
        else:
            raise TypeError(f"callbacks: {each!r} must be a narrows.training.Callback or a function of the progress")
    return found


class EpochPrinter(Callback):
    """Prints one line for each epoch, for ``verbose=2``.

    Examples
    --------
    >>> import numpy as np
    >>> from narrows import Autoencoder
    >>> from narrows.training import EpochPrinter
    >>> X = np.random.default_rng(0).normal(size=(60, 8))
    >>> fit = Autoencoder(2, max_iter=1).fit(X, callbacks=[EpochPrinter()])  # doctest: +ELLIPSIS
    epoch 1/1  loss ...
    """

    def on_epoch_end(self, progress: Progress) -> None:
        val = "" if progress.val_loss is None else f"  val_loss {progress.val_loss:.6g}"
        print(
            f"epoch {progress.epoch}/{progress.max_iter}  loss {progress.loss:.6g}{val}  "
            f"learning_rate {progress.learning_rate:.3g}  {progress.seconds:.1f} s",
            flush=True,
        )


class ProgressBar(Callback):
    """A tqdm bar over the epochs, for ``verbose=1``. It also moves within an epoch.

    Parameters
    ----------
    stream : file, optional
        Standard error by default. A notebook shows a widget instead, if it can.

    Examples
    --------
    >>> import io
    >>> import numpy as np
    >>> from narrows import Autoencoder
    >>> from narrows.training import ProgressBar
    >>> shown = io.StringIO()
    >>> fit = Autoencoder(2, max_iter=2).fit(np.eye(30), callbacks=[ProgressBar(shown)])
    >>> "2.0/2 epochs" in shown.getvalue()
    True
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._bar: Any = None

    def _show(self, p: Progress, done: float) -> None:
        if self._bar is None:
            self._bar = _tqdm()(
                total=p.max_iter,
                initial=int(done),
                unit="epoch",
                file=self._stream or sys.stderr,
                dynamic_ncols=True,
                bar_format="{l_bar}{bar}| {n:.1f}/{total} epochs [{elapsed}<{remaining}{postfix}]",
            )
        self._bar.n = done
        self._bar.set_postfix_str(losses_text(p), refresh=False)
        self._bar.refresh() if done == p.max_iter else self._bar.update(0)

    def on_batch(self, progress: Progress) -> None:
        self._show(progress, progress.epoch + progress.step / progress.steps_per_epoch)

    def on_epoch_end(self, progress: Progress) -> None:
        self._show(progress, progress.epoch)

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def losses_text(p: Progress) -> str:
    text = f"loss {p.loss:.5g}"
    return text if p.val_loss is None or math.isnan(p.val_loss) else f"{text}, val_loss {p.val_loss:.5g}"


def shown(verbose: int) -> list[Callback]:
    """The callbacks for an estimator's `verbose`. Where a bar cannot move, as in a log file, there are lines."""
    if not verbose:
        return []
    moves = in_notebook() or (sys.stderr is not None and sys.stderr.isatty())
    return [ProgressBar() if int(verbose) == 1 and moves else EpochPrinter()]


def in_notebook() -> bool:
    """Whether this is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in getattr(shell, "config", {})


def _tqdm() -> Any:
    """tqdm's bar for this place; a text bar in notebooks without widgets."""
    if in_notebook():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tqdm warns if ipywidgets is missing, and then shows text
            from tqdm.auto import tqdm as automatic

            return automatic
    from tqdm import tqdm

    return tqdm
