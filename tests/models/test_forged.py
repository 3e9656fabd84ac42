"""Files with a valid checksum and forged content: each gives the project's error in one line, or works."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest

import narrows as nw
from narrows.errors import DataError, ModelFileError, ResumeError
from narrows.fitting.files import stored_normalizer
from narrows.persistence import load_tensors, save_tensors
from narrows.training import Callback, Checkpoint, Interrupted

X = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
VALUES = [
    None, True, -1, 0, 2**31, 2**63, 10**30, 0.5, -0.5, math.nan, math.inf, -math.inf, "", "x", [], [None], (), (1.5,),
    {}, {"a": 1},
]  # fmt: skip


def places(value, place=()):
    """Every place of a tree of settings."""
    if place:
        yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, item in items:
        yield from places(item, (*place, key))


def changed(tree, place, change):
    """A copy of the tree with another value at a place; `...` removes it."""
    key, *rest = place
    keep = list if isinstance(tree, list | tuple) else dict
    copy = keep(tree)
    if rest:
        copy[key] = changed(copy[key], rest, change)
    elif change is ...:
        del copy[key]
    else:
        copy[key] = change
    return tuple(copy) if isinstance(tree, tuple) else copy


def forgeries(path, kind, seed, count):
    """Write `count` forged files to a path; yield what was forged."""
    tensors, meta = load_tensors(path, kind=kind)
    rng = np.random.default_rng(seed)
    everywhere, names = list(places(meta)), sorted(tensors)
    for _ in range(count):
        if rng.random() < 0.8:
            place = everywhere[rng.integers(len(everywhere))]
            value = [*VALUES, ...][rng.integers(len(VALUES) + 1)]
            extra = rng.random() < 0.1 and isinstance(place[-1], str)
            forged = changed(meta, (*place[:-1], "extra") if extra and value is not ... else place, value)
            save_tensors(path, tensors, forged, kind=kind)
            yield place, value
        else:
            name = names[rng.integers(len(names))]
            array = tensors[name]
            new = [
                array.astype(np.float64), array.astype(np.int32), array[..., :-1], array[None], array.reshape(-1),
                np.full_like(array, np.nan), np.full_like(array, np.inf), np.zeros((0, 3), np.float32), np.array(1.0),
            ]  # fmt: skip
            pick = rng.integers(len(new) + 2)
            others = {n: a for n, a in tensors.items() if n != name}
            given = (
                others
                if pick == len(new)
                else tensors | {"extra": array}
                if pick > len(new)
                else others | {name: new[pick]}
            )
            save_tensors(path, given, meta, kind=kind)
            yield name, pick


def one_line(error, advice=" "):
    assert advice in str(error)
    assert "\n" not in str(error)
    assert len(str(error)) < 1000


class StopAfter(Callback):
    def __init__(self, steps):
        self.left = steps

    def on_batch(self, progress):
        self.left -= 1


@pytest.mark.parametrize("at", ["in an epoch", "between epochs", "at the end"])
@pytest.mark.filterwarnings("ignore")
def test_forged_checkpoints(at, tmp_path, monkeypatch):
    monkeypatch.setattr("narrows.training.trainer.CHUNK_SECONDS", 0.0)  # one step at a time
    path = tmp_path / "c.safetensors"
    counter = StopAfter({"in an epoch": 14, "between epochs": 10, "at the end": 10**6}[at])

    def fit(**options):
        ae = nw.Autoencoder(
            2, hidden_layer_sizes=(4,), max_iter=4, batch_size=8, n_threads=1, validation_fraction=0.2,
            backend="reference", learning_rate="plateau", random_state=None if at == "between epochs" else 0,
        )  # fmt: skip
        return ae.fit(X, checkpoint=Checkpoint(path, **options), callbacks=[counter])

    with contextlib.suppress(Interrupted):
        fit(stop=lambda: "enough" if counter.left <= 0 else None)
    whole, refused = path.read_bytes(), 0
    counter.left = 10**6
    expected = fit().transform(X)
    path.write_bytes(whole)
    assert np.array_equal(fit().transform(X), expected)  # the plain file resumes
    path.write_bytes(whole)
    for what in forgeries(path, "checkpoint", 0, 120):
        try:
            fit()
        except (ModelFileError, ResumeError) as error:
            one_line(error, "resume='never'")
            refused += 1
        except Exception as error:
            pytest.fail(f"{what}: {type(error).__name__}: {error}")
    assert refused > 90


@pytest.mark.parametrize("cls", ["Autoencoder", "CountAutoencoder", "ConvAutoencoder", "DeepAutoencoder"])
@pytest.mark.filterwarnings("ignore")
def test_forged_models(cls, tmp_path):
    path = tmp_path / "m.safetensors"
    data = np.abs(X).round() if cls == "CountAutoencoder" else X
    options = {
        "ConvAutoencoder": {"image_shape": (2, 3, 1), "filters": (2,), "kernel_size": 3, "strides": 1},
        "DeepAutoencoder": {"hidden_layer_sizes": (4,)},
        "CountAutoencoder": {"hidden_layer_sizes": (4,)},
        "Autoencoder": {"hidden_layer_sizes": (4,), "corruption": "salt_and_pepper", "corruption_level": 0.1},
    }[cls]
    ae = getattr(nw, cls)(2, max_iter=2, n_threads=1, backend="reference", random_state=0, **options).fit(data)
    ae.metadata_ = {
        "normalizer": nw.Normalizer("none" if cls == "CountAutoencoder" else "standard").fit(data).to_dict()
    }
    ae.save(path)
    refused = 0
    for what in forgeries(path, "model", 1, 120):
        try:
            loaded = nw.load(path)
            stored_normalizer(loaded)
            loaded.transform(data)
        except (ModelFileError, DataError) as error:
            one_line(error)
            refused += 1
        except Exception as error:
            pytest.fail(f"{what}: {type(error).__name__}: {error}")
    assert refused > 60


def test_a_model_with_an_absurd_batch_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    nw.Autoencoder(2, hidden_layer_sizes=(4,), max_iter=1, n_threads=1).fit(X).save(path)
    tensors, meta = load_tensors(path, kind="model")
    meta["network"]["batch"] = 2**63
    save_tensors(path, tensors, meta, kind="model")
    with pytest.raises(ModelFileError, match="batch is 9223372036854775808"):
        nw.load(path)
