"""What estimators take, whatever its dtype, layout and container, and what they refuse."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import scipy.sparse as sp
import sklearn
from sklearn.base import clone
from sklearn.exceptions import DataConversionWarning, NotFittedError

from estimator_cases import BACKEND, ESTIMATORS, fitting, ids, low_rank, same_rows, small
from narrows import RBM, CountAutoencoder, functional
from narrows.backends import probe
from narrows.data import ArraySource, as_source, check_finite
from narrows.data.normalize import Normalizer
from narrows.errors import DataError


@pytest.fixture(scope="module")
def X() -> np.ndarray:
    return low_rank()


# --- shapes, dtypes, containers -----------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=ids)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_shapes_and_dtypes(estimator: Any, dtype: Any, X: np.ndarray) -> None:
    X = fitting(estimator, X.astype(dtype))
    ae = clone(estimator).fit(X)
    Z = ae.transform(X)
    assert Z.shape == (200, ae.n_components)
    for rows in (Z, ae.inverse_transform(Z), ae.reconstruct(X), ae.score_samples(X)):
        assert rows.dtype == dtype
        assert len(rows) == 200
        assert np.isfinite(rows).all()
    counts = isinstance(ae, CountAutoencoder)
    if not counts:  # whose means are in proportion to the rows' sums
        np.testing.assert_allclose(ae.inverse_transform(Z), ae.reconstruct(X), rtol=1e-5, atol=1e-6)
    assert ae.score(X) == pytest.approx(ae.score_samples(X).mean(), rel=1e-5)
    errors = ae.feature_errors(X)
    assert errors.shape == (12,)
    if not ae.variational and not counts and not isinstance(ae, RBM):
        assert errors.sum() == pytest.approx(-ae.score(X), rel=1e-4)
    assert ae.backend_ == BACKEND
    assert ae.get_feature_names_out()[0] == f"{type(ae).__name__.lower()}0"


@pytest.mark.parametrize("dtype", [np.float16, np.int32, np.uint8, bool])
def test_other_dtypes_become_float32(dtype: Any, X: np.ndarray) -> None:
    D = (X.mean() < X).astype(dtype)
    assert small().fit(D).transform(D).dtype == np.float32


@pytest.mark.parametrize("layout", ["F", "reversed", "byte-swapped", "read-only"])
def test_layouts_give_the_same_bits(layout: str, X: np.ndarray) -> None:
    given = {
        "F": np.asfortranarray(X),
        "reversed": X[::-1, ::-1].copy()[::-1, ::-1],
        "byte-swapped": X.astype(">f4"),
        "read-only": X.copy(),
    }[layout]
    given.flags.writeable = False
    expected = small().fit(X)
    ae = small().fit(given)
    assert (ae.transform(given) == expected.transform(X)).all()
    assert ae.history_["loss"] == expected.history_["loss"]


def test_memory_map(tmp_path: Path, X: np.ndarray) -> None:
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert (small().fit(mapped).transform(mapped) == small().fit(X).transform(X)).all()


@pytest.mark.parametrize("kind", [sp.csr_array, sp.csr_matrix, sp.csc_array, sp.csc_matrix])
@pytest.mark.parametrize("corruption", [None, "salt_and_pepper"])
def test_sparse_is_close_to_dense(kind: Any, corruption: str | None, X: np.ndarray) -> None:
    D = np.where(np.median(X) < X, X, 0)
    params = {"corruption": corruption, "corruption_level": 0.1}
    dense, sparse = small(**params).fit(D), small(**params).fit(kind(D))
    np.testing.assert_allclose(sparse.transform(kind(D)), dense.transform(D), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sparse.feature_errors(kind(D)), dense.feature_errors(D), rtol=1e-4)
    assert sparse.score(kind(D)) == pytest.approx(dense.score(D), rel=1e-4)


def test_unsorted_csr_with_duplicates_is_left_alone(X: np.ndarray) -> None:
    D = np.where(np.median(X) < X, X, 0)
    C = sp.csr_array(D)
    data, indices = C.data.copy(), C.indices.copy()
    for i in range(C.shape[0]):
        row = slice(C.indptr[i], C.indptr[i + 1])
        data[row], indices[row] = data[row][::-1], indices[row][::-1]
    messy = sp.csr_array((data, indices, C.indptr.astype(np.int64)), shape=C.shape)
    before = messy.data.copy(), messy.indices.copy()
    assert (small().fit(messy).transform(messy) == small().fit(C).transform(C)).all()
    assert (messy.data == before[0]).all()
    assert (messy.indices == before[1]).all()


def test_frames(X: np.ndarray) -> None:
    pd, pl = pytest.importorskip("pandas"), pytest.importorskip("polars")
    names = [f"g{i}" for i in range(12)]
    frame = pd.DataFrame(X, columns=names, index=[f"c{i}" for i in range(200)])
    ae = small().fit(frame)
    assert list(ae.feature_names_in_) == names
    assert (ae.transform(frame) == small().fit(X).transform(X)).all()
    out = ae.set_output(transform="pandas").transform(frame)
    assert list(out.columns) == list(ae.get_feature_names_out())
    assert list(out.index) == list(frame.index)
    with pytest.raises(ValueError, match="feature names should match"):
        ae.transform(frame[names[::-1]])
    polars = pl.DataFrame(X, schema=names)
    assert (small().fit(polars).transform(polars) == small().fit(X).transform(X)).all()


def test_source_names_are_checked(X: np.ndarray) -> None:
    names = np.array([f"g{i}" for i in range(12)])
    ae = small().fit(ArraySource(X, var_names=names))
    assert list(ae.feature_names_in_) == list(names)
    with pytest.raises(ValueError, match="column 0 is 'g11', not 'g0'"):
        ae.transform(ArraySource(X, var_names=names[::-1]))
    with pytest.raises(ValueError, match="X has 5 features, but Autoencoder is expecting 12"):
        ae.transform(ArraySource(X[:, :5]))


@pytest.mark.parametrize("sparse", [False, True])
def test_source_in_one_block_equals_the_array(sparse: bool, X: np.ndarray) -> None:
    data = sp.csr_array(np.where(np.median(X) < X, X, 0)) if sparse else X
    a, b = small().fit(data), small().fit(ArraySource(data))
    assert all((u == v).all() for u, v in zip(a.coefs_, b.coefs_, strict=True))
    assert (a.transform(data) == b.transform(ArraySource(data))).all()


@pytest.mark.parametrize("sparse", [False, True])
def test_source_in_blocks(sparse: bool, X: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    data = sp.csr_array(np.where(np.median(X) < X, X, 0)) if sparse else X
    source = ArraySource(data)
    ae = small(max_iter=30).fit(source, block_bytes=3000)
    assert ae.history_["loss"][-1] < ae.history_["loss"][0]
    assert ae.history_["loss"][-1] == pytest.approx(small(max_iter=30).fit(data).history_["loss"][-1], rel=0.3)
    whole = [ae.transform(data), ae.reconstruct(data), ae.score_samples(data), ae.feature_errors(data)]
    monkeypatch.setattr("narrows.models.base.BLOCK_BYTES", 3000)
    parts = [
        ae.transform(source),
        ae.reconstruct(source),
        ae.score_samples(source),
        ae.feature_errors(source),
    ]
    for one, other in zip(whole[:3], parts[:3], strict=True):
        assert same_rows(one, other)
    np.testing.assert_allclose(whole[3], parts[3], rtol=1e-12 if BACKEND == "cpp" else 1e-4)


# --- refused ------------------------------------------------------------------------------------------------

BAD_PARAMETERS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"n_components": 0}, ValueError, "n_components=0 must be at least 1"),
    ({"n_components": 2.5}, TypeError, "n_components=2.5 must be an integer"),
    ({"n_components": True}, TypeError, "n_components=True"),
    ({"hidden_layer_sizes": (8, 0)}, ValueError, "hidden_layer_sizes"),
    ({"hidden_layer_sizes": "8"}, TypeError, "hidden_layer_sizes='8'"),
    ({"decoder_layer_sizes": 1.5}, TypeError, "decoder_layer_sizes=1.5"),
    ({"activation": "softmax"}, ValueError, "activation='softmax' must be one of linear, relu"),
    ({"latent_activation": None}, TypeError, "latent_activation=None"),
    ({"loss": "poison"}, ValueError, "loss='poison' must be one of mse, bce, huber, multinomial, gaussian"),
    ({"loss": "bce", "output_activation": "relu"}, ValueError, "choose from auto, sigmoid"),
    ({"loss": "multinomial", "output_activation": "linear"}, ValueError, "choose from auto, softmax"),
    ({"corruption": "rain"}, ValueError, "must be one of gaussian, masking, salt_and_pepper, None"),
    ({"corruption": "masking", "corruption_level": 1.5}, ValueError, r"must be in \[0, 1\]: it is a probability"),
    ({"corruption_level": -1}, ValueError, "corruption_level=-1"),
    ({"dropout": 1.0}, ValueError, r"dropout=1.0 must be in \[0, 1\)"),
    ({"kl_sparsity": 1.0}, ValueError, "kl_sparsity needs latent_activation='sigmoid'"),
    ({"tied_weights": True, "decoder_layer_sizes": (4,)}, ValueError, r"must be None or \(8,\)"),
    ({"tied_weights": 1}, TypeError, "tied_weights=1 must be True or False"),
    ({"alpha": float("nan")}, ValueError, "alpha=nan"),
    ({"solver": "lbfgs"}, ValueError, "solver='lbfgs' must be one of sgd, adam, adamw"),
    ({"learning_rate_init": 0}, ValueError, "learning_rate_init=0 must be in"),
    ({"learning_rate_init": "fast"}, TypeError, "learning_rate_init='fast' must be a number"),
    ({"clip_norm": 0.0}, ValueError, "clip_norm=0.0"),
    ({"learning_rate": "warm"}, ValueError, "constant, cosine, plateau"),
    ({"batch_size": 0}, ValueError, "batch_size=0"),
    ({"max_iter": 0}, ValueError, "max_iter=0"),
    ({"validation_fraction": 1.0}, ValueError, r"validation_fraction=1.0 must be in \(0, 1\)"),
    ({"random_state": -1}, ValueError, "random_state=-1"),
    ({"random_state": "lucky"}, TypeError, "random_state='lucky'"),
    ({"precision": "float16"}, ValueError, "precision='float16' must be one of float32, float64"),
    ({"backend": "abacus"}, ValueError, "backend='abacus' is not a backend"),
    ({"n_threads": 0}, ValueError, "n_threads=0"),
    ({"n_threads": 10**12}, ValueError, "n_threads=1000000000000 must be a positive integer of at most 4096"),
]


@pytest.mark.parametrize(("params", "error", "message"), BAD_PARAMETERS, ids=lambda v: str(v)[:40])
def test_bad_parameters(params: dict[str, Any], error: type[Exception], message: str, X: np.ndarray) -> None:
    ae = small(**params)
    with pytest.raises(error, match=message) as raised:
        ae.fit(X)
    assert "\n" not in str(raised.value)
    with pytest.raises(NotFittedError):
        ae.transform(X)


def _with(X: np.ndarray, row: int, column: int, value: Any) -> np.ndarray:
    X = X.copy()
    X[row, column] = value
    return X


BAD_DATA: list[tuple[str, Callable[[np.ndarray], Any], str]] = [
    ("nan", lambda X: small().fit(_with(X, 7, 3, np.nan)), "X: NaN in row 7, column 3"),
    ("inf", lambda X: small().fit(_with(X, 7, 3, np.inf)), "X: inf in row 7, column 3"),
    ("sparse nan", lambda X: small().fit(sp.csr_array(_with(X, 7, 3, np.nan))), "NaN in row 7, column 3"),
    ("source nan", lambda X: small().fit(ArraySource(_with(X, 7, 3, np.nan))), "NaN in row 7, column 3"),
    (
        "later block nan",
        lambda X: small().fit(ArraySource(_with(X, 170, 3, np.nan)), block_bytes=2000),
        "NaN in row 170, column 3",
    ),
    ("val nan", lambda X: small().fit(X, X_val=_with(X, 7, 3, np.nan)), "^X_val: NaN in row 7, column 3"),
    (
        "val source nan",
        lambda X: small().fit(X, X_val=ArraySource(_with(X, 7, 3, np.nan))),
        "^X_val: NaN in row 7, column 3",
    ),
    ("val bce", lambda X: small(loss="bce").fit(X, X_val=_with(X, 9, 2, 1.5)), "^X_val: 1.5 in row 9, column 2"),
    ("val target", lambda X: small().fit(X, X, X_val=(X, _with(X, 7, 3, np.inf))), "^y_val: inf in row 7"),
    ("val target rows", lambda X: small().fit(X, X, X_val=(X, X[:5])), "^y_val has 5 rows, but X_val has 200"),
    (
        "beyond float32",
        lambda X: small().fit(_with(X.astype(float), 7, 3, -1e39)),
        r"^X: -1e\+39 in row 7, column 3; too large for float32: scale",
    ),
    (
        "sparse beyond float32",
        lambda X: small().fit(X).transform(sp.csr_array(_with(X.astype(float), 7, 3, 1e300))),
        r"^X: 1e\+300 in row 7, column 3; too large",
    ),
    (
        "later block beyond float32",
        lambda X: small().fit(ArraySource(_with(X.astype(float), 170, 3, 1e300)), block_bytes=2000),
        r"^X: 1e\+300 in row 170, column 3; too large",
    ),
    (
        "codes beyond float32",
        lambda X: small().fit(X).inverse_transform(np.full((2, 3), 1e39)),
        r"^Z: 1e\+39 in row 0, column 0; too large",
    ),
    (
        "scored beyond float32",
        lambda X: small().fit(X).score(X, _with(X.astype(float), 7, 3, 1e39)),
        r"^y: 1e\+39 in row 7, column 3; too large",
    ),
    ("masked", lambda X: small().fit(np.ma.masked_less(X, 0.5)), "^X: a masked array with masked values"),
    ("masked target", lambda X: small().fit(X, np.ma.masked_less(X, 0.5)), "^y: a masked array"),
    ("masked codes", lambda X: small().fit(X).inverse_transform(np.ma.masked_less(X[:, :3], 0.5)), "^Z: a masked"),
    ("bce", lambda X: small(loss="bce").fit(_with(X, 9, 2, 1.5)), r"1.5 in row 9, column 2; loss='bce'"),
    (
        "sparse bce",
        lambda X: small(loss="bce").fit(sp.csr_array(_with(X, 9, 2, 1.5))),
        r"1.5 in row 9, column 2; loss='bce'",
    ),
    (
        "source bce",
        lambda X: small(loss="bce").fit(ArraySource(_with(X, 150, 2, 1.5)), block_bytes=2000),
        "1.5 in row 150, column 2",
    ),
    ("multinomial", lambda X: small(loss="multinomial").fit(_with(X, 9, 2, -1)), "-1 in row 9, column 2"),
    ("target", lambda X: small(loss="bce").fit(X, _with(X, 9, 2, 1.5)), "y: 1.5 in row 9, column 2"),
    ("score", lambda X: small(loss="bce").fit(X).score(_with(X, 9, 2, 1.5)), "X: 1.5 in row 9, column 2"),
    ("y rows", lambda X: small().fit(X, X[:5]), "y has 5 rows, but X has 200"),
    ("y nan", lambda X: small().fit(X, _with(X, 7, 3, np.nan)), "y: NaN in row 7, column 3"),
    ("weight shape", lambda X: small().fit(X, sample_weight=np.ones(5)), r"sample_weight has shape \(5,\)"),
    ("weight sign", lambda X: small().fit(X, sample_weight=-np.ones(200)), "sample_weight: -1 at row 0"),
    (
        "no weight",
        lambda X: small().fit(X, sample_weight=np.zeros(200)),
        "sample_weight is zero for every row",
    ),
    ("one row", lambda X: small().fit(X[:1]), "minimum of 2 is required"),
    ("one source row", lambda X: small().fit(ArraySource(X[:1])), "minimum of 2 is required"),
    (
        "features",
        lambda X: small().fit(X).transform(X[:, :5]),
        "X has 5 features, but Autoencoder is expecting 12",
    ),
    ("codes", lambda X: small().fit(X).inverse_transform(X), "Z has 12 columns, but Autoencoder has 3"),
    ("val width", lambda X: small().fit(X, X_val=X[:, :5]), "^X_val: X has 5 features"),
    ("val pair", lambda X: small().fit(X, X, X_val=X), r"X_val must be a pair"),
    (
        "score width",
        lambda X: small().fit(X).score(X, X[:, :5]),
        "y has 5 columns, but the reconstruction has 12",
    ),
]


@pytest.mark.parametrize(("call", "message"), [b[1:] for b in BAD_DATA], ids=[b[0] for b in BAD_DATA])
def test_bad_data(call: Callable[[np.ndarray], Any], message: str, X: np.ndarray) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        call(X)
    assert "\n" not in str(raised.value)


def _damaged(indices: tuple[int, int] | None = None, indptr: tuple[int, int] | None = None) -> sp.csr_array:
    """A CSR of 200 x 12, one number of which is another."""
    csr = sp.random_array((200, 12), density=0.3, format="csr", dtype=np.float32, rng=np.random.default_rng(0))
    for part, change in ((csr.indices, indices), (csr.indptr, indptr)):
        if change is not None:
            part[change[0]] = change[1]
    return csr


DAMAGED = [
    ("column", lambda: _damaged(indices=(5, 1 << 28)), "X: row 0 has column index 268435456, outside 0..11"),
    ("negative column", lambda: _damaged(indices=(5, -1 << 28)), "X: row 0 has column index -268435456, outside 0..11"),
    ("falling", lambda: _damaged(indptr=(100, 5)), "X: indptr decreases at row 99"),
    ("start", lambda: _damaged(indptr=(0, 1)), "X: indptr runs from 1 to 720, but 720 values are stored"),
]


@pytest.mark.parametrize("backend", ["cpp", "numba", "reference"])
@pytest.mark.parametrize(("make", "message"), [d[1:] for d in DAMAGED], ids=[d[0] for d in DAMAGED])
def test_damaged_csr_is_refused_before_it_is_walked(make: Callable[[], Any], message: str, backend: str) -> None:
    if not probe(backend).ok:
        pytest.skip(f"no {backend}")
    ae = small(backend=backend, max_iter=1)
    with pytest.raises(ValueError, match=message):
        ae.fit(make())
    ae.fit(_damaged())
    with pytest.raises(ValueError, match=message):
        ae.transform(make())
    with pytest.raises(ValueError, match=message.replace("X", "y", 1)):
        ae.score(_damaged(), make())


@pytest.mark.parametrize("wrap", [np.asarray, sp.csr_array, ArraySource])
def test_float64_takes_what_float32_cannot_hold(wrap: Callable[[np.ndarray], Any], X: np.ndarray) -> None:
    D = wrap(_with(X.astype(float), 7, 3, 1e39))
    assert np.isfinite(small(precision="float64", max_iter=1).fit(D).transform(D)).all()


def test_room_behind_the_stored_values_is_not_read() -> None:
    csr = _damaged()
    roomy = sp.csr_array((200, 12), dtype=np.float32)
    roomy.indptr = csr.indptr
    roomy.indices = np.append(csr.indices, np.full(9, 1 << 28, csr.indices.dtype))
    roomy.data = np.append(csr.data, np.full(9, np.nan, np.float32))
    assert (small().fit(roomy).transform(roomy) == small().fit(csr).transform(csr)).all()
    assert len(roomy.data) == len(csr.data) + 9


def test_containers_that_are_no_rows_name_what_to_pass(X: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"X is a path: pass narrows.data.open\(X\)"):
        small().fit(str(tmp_path / "cells.h5ad"))
    with pytest.raises(TypeError, match="X_val is a path"):
        small().fit(X, X_val=tmp_path)
    anndata = pytest.importorskip("anndata")
    with pytest.raises(TypeError, match="X is an AnnData: pass its X"):
        small().fit(anndata.AnnData(X))


class Tensor:
    """An array of a library that shares memory by DLPack alone, as PyTorch's tensors, and does not become an array."""

    def __init__(self, array: np.ndarray, dtype: str | None = None, *, requires_grad: bool = False) -> None:
        self.array, self.dtype, self.requires_grad = array, dtype or f"torch.{array.dtype}", requires_grad
        self.shape, self.ndim = array.shape, array.ndim

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        if self.requires_grad or "bfloat16" in self.dtype:
            raise BufferError("this tensor cannot be exported")
        return self.array.__dlpack__(**options)

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("cannot become an array")


@pytest.fixture(params=[False, True], ids=["plain", "array_api_dispatch"])
def dispatch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both settings of scikit-learn. With dispatch it asks an array for its namespace, which `Tensor` has not."""
    if request.param:
        pytest.importorskip("array_api_compat")
        monkeypatch.setenv("SCIPY_ARRAY_API", "1")
    with sklearn.config_context(array_api_dispatch=request.param):
        yield


@pytest.mark.usefixtures("dispatch")
def test_arrays_of_other_libraries_are_taken_by_dlpack(X: np.ndarray) -> None:
    weight = np.linspace(0, 1, len(X))
    plain = small().fit(X, X[::-1].copy(), sample_weight=weight, X_val=(X[:9], X[9:18]))
    shared = [Tensor(a) for a in (X, X[::-1].copy(), weight, X[:9], X[9:18])]
    ae = small().fit(shared[0], shared[1], sample_weight=shared[2], X_val=(shared[3], shared[4]))
    assert (ae.transform(shared[0]) == plain.transform(X)).all()
    assert ae.score(shared[0], shared[1]) == plain.score(X, X[::-1])
    codes = plain.transform(X)
    assert (ae.inverse_transform(Tensor(codes)) == plain.inverse_transform(codes)).all()
    assert (Normalizer("standard").fit_transform(shared[0]) == Normalizer("standard").fit_transform(X)).all()
    assert (as_source(shared[0]).read_rows(slice(None)) == X).all()
    assert (functional.dense(X, Tensor(X[:12])) == functional.dense(X, X[:12])).all()
    calls: list[Callable[[Any], Any]] = [
        small().fit,
        ae.transform,
        ae.reconstruct,
        Normalizer().fit,
        as_source,
        lambda T: functional.dense(T, X[:12]),
        lambda T: functional.contractive_penalty(T, [X[:12]], [None], "tanh"),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"^X requires gradients, which are not traced here: pass X.detach\(\)$"):
            call(Tensor(X, requires_grad=True))
        with pytest.raises(TypeError, match=r"^X is torch.bfloat16, which NumPy lacks: pass it as float32$"):
            call(Tensor(X, "torch.bfloat16"))
    with pytest.raises(TypeError, match=r"^y requires gradients"):
        small().fit(X, Tensor(X, requires_grad=True))


def test_a_column_of_labels_is_not_used_without_a_word(X: np.ndarray) -> None:
    for y in (X[:, :1], pandas.DataFrame({"kind": np.arange(len(X)) % 3})):
        with pytest.warns(DataConversionWarning, match=r"y has shape \(200, 1\) .* y.ravel\(\), which are ignored"):
            assert small(max_iter=1).fit(X, y).reconstruct(X).shape == (200, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataConversionWarning)
        small(max_iter=1).fit(X, X[:, 0]).fit(X, X).fit(X[:, :1], X[:, 1:2])


FRAME = pandas.DataFrame(low_rank(), columns=list("abcdefghijkl"))
OBJECTS = low_rank().astype(object)
NO_NUMBERS: dict[str, tuple[Any, str]] = {
    "one dimension": (low_rank()[:, 0], r"Expected 2D array, got 1D array instead. Reshape your data: X.reshape"),
    "list": ([1.0, 2.0], r"Reshape your data: np.asarray\(X\).reshape\(-1, 1\) for one feature"),
    "series": (FRAME["a"], r"Reshape your data: X.to_numpy\(\).reshape"),
    "number": (3.0, "X is a float; an array of rows and columns is needed"),
    "nothing": (None, "X is a NoneType; an array"),
    "dictionary": ({"a": 1}, "X is a dict; an array"),
    "complex": (low_rank() + 1j, "numbers expected, got dtype complex"),
    "sparse complex": (sp.csr_array(low_rank() + 1j), "numbers expected, got dtype complex"),
    "strings": (low_rank().astype(str), r"numbers expected, got dtype <U\d+; pass X.astype\(float\)"),
    "bytes": (low_rank().astype("S9"), r"numbers expected, got dtype \|S9; pass X.astype\(float\)"),
    "times": (low_rank().astype("M8[s]"), r"numbers expected, got dtype datetime64\[s\]; pass X.astype\('int64'\)"),
    "records": (np.zeros((3, 2), [("a", "f4")]), "numbers expected, got dtype"),
    "masked": (np.ma.masked_less(low_rank(), 0.5), "X: a masked array with masked values; fill them first"),
    "text in objects": (_with(OBJECTS, 7, 3, "x"), "X: 'x' in row 7, column 3 is not a number"),
    "objects in objects": (_with(OBJECTS, 7, 3, {"a": 1}), "X: {'a': 1} in row 7, column 3 is not a number"),
    "None": (_with(OBJECTS, 7, 3, None), "X: NaN in row 7, column 3; remove or impute it"),
    "text in a frame": (FRAME.assign(g="u"), r"X: 'u' in row 0, column 6 \(g\) is not a number"),
    "categories": (FRAME.assign(g=pandas.Categorical(["u", "v"] * 100)), r"'u' in row 0, column 6 \(g\) is not a"),
    "times in a frame": (FRAME.assign(g=pandas.Timestamp(0)), "X: column 'g' is datetime64.*, not a number; drop or"),
    "spans in a frame": (FRAME.assign(g=pandas.Timedelta(0)), "X: column 'g' is timedelta64"),
    "Float64 with NA": (FRAME.astype("Float64").mask(FRAME.iloc[7, 3] == FRAME), r"NaN in row 7, column 3 \(d\)"),
    "Int64 with NA": ((9 * FRAME).round().astype("Int64").mask(FRAME.iloc[7, 3] == FRAME), r"NaN in row 7, column 3"),
}


@pytest.mark.parametrize("name", NO_NUMBERS)
def test_what_is_no_table_of_numbers_is_told_in_one_line(name: str) -> None:
    """By estimators and by the normaliser, with the row and the column if one value is at fault."""
    given, message = NO_NUMBERS[name]
    for call in (small(max_iter=1).fit, Normalizer("standard").fit):
        with pytest.raises((ValueError, TypeError), match=message) as raised:
            call(given)
        assert "\n" not in str(raised.value)
        assert isinstance(raised.value, TypeError) == (name == "objects in objects")
    said = "not a table of numbers|numbers expected|rows and columns are needed|masked|not a number"
    if "NA" in name or name == "None":
        source = as_source(given)
        with pytest.raises(DataError, match=message):
            check_finite(source.read_rows(slice(None)), 0, source)
    else:
        with pytest.raises(DataError, match=said):
            as_source(given)


def test_objects_and_nullable_columns_that_hold_numbers_are_taken(X: np.ndarray) -> None:
    expected = small(max_iter=1).fit(X.astype(float)).transform(X.astype(float))
    for given in (OBJECTS, FRAME.astype("Float64"), FRAME.astype(object), np.ma.array(X.astype(float)), X.tolist()):
        assert (small(max_iter=1).fit(given).transform(given) == expected).all()
        assert (as_source(given).read_rows(slice(None)) == X).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"checkpoint": "last.safetensors"}, "checkpoint='last.safetensors' must be a narrows.training.Checkpoint"),
        ({"callbacks": [3]}, "callbacks: 3 must be a narrows.training.Callback"),
    ],
    ids=["checkpoint", "callback"],
)
def test_what_is_no_checkpoint_or_callback_is_told_before_training(
    given: dict[str, Any], message: str, X: np.ndarray
) -> None:
    ae = small()
    with pytest.raises(TypeError, match=message):
        ae.fit(X, **given)
    assert not hasattr(ae, "n_iter_")


def test_a_failed_fit_leaves_the_earlier_one(X: np.ndarray) -> None:
    ae = small().fit(X)
    before = ae.transform(X)
    with pytest.raises(ValueError, match="NaN"):
        ae.fit(_with(X[:, :5], 0, 0, np.nan))
    assert (ae.transform(X) == before).all()
    assert ae.n_features_in_ == 12
