"""Convolutions: their geometry, and their ops against SciPy's correlation and against Jacobians written out."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.signal import correlate

import agreement
from cases import CPU_PRECISIONS, convolutional
from narrows.backends import Hyper, compile_plan
from narrows.plan.geometry import Convolution
from narrows.plan.lowering import lower
from narrows.plan.plan import Mode
from narrows.plan.spec import Activation, LayerSpec, Precision, Solver
from networks import Case, changed, conv, images
from oracle import SEED, STEP, forward, jacobian

Array = NDArray[Any]


# --- geometry -----------------------------------------------------------------------------------------------


def test_sizes() -> None:
    of = Convolution.of
    assert of((28, 28, 1), 16, (3, 3)).out_shape == (28, 28, 16)
    assert of((28, 28, 1), 16, (3, 3), strides=(2, 2), pool=(2, 7)).out_shape == (7, 2, 16)
    assert of((9, 7, 3), 4, (3, 2), strides=(2, 1), padding="valid").out_shape == (4, 6, 4)
    assert of((4, 5, 3), 4, (3, 3), upsample=(2, 3)).out_shape == (8, 15, 4)
    assert of((4, 6, 3), 4, (3, 2), strides=(2, 1), padding="valid", transposed=True).out_shape == (9, 7, 4)
    assert of((7, 7, 3), 4, (5, 5), strides=(2, 2), transposed=True).out_shape == (14, 14, 4)
    assert of((7, 7, 3), 4, (5, 5)).weight_shape == (75, 4)


def test_geometry_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"kernel \(9, 3\) is larger than the image of 8 x 8 pixels"):
        Convolution.of((8, 8, 1), 2, (9, 3), padding="valid")
    with pytest.raises(ValueError, match="pools of 3 x 2 do not divide an image of"):
        Convolution.of((8, 8, 1), 2, (3, 3), pool=(3, 2))


@pytest.mark.parametrize(
    ("layer", "changes", "message"),
    [
        (1, {"n_in": 81}, "layer 1 has images of 80 and 12 values in rows of 81"),
        (
            1,
            {"convolution": Convolution.of((4, 5, 4), 3, (3, 3), pool=(4, 5)), "n_out": 3},
            r"reads images \(4, 5, 4\)",
        ),
        (3, {"tied_to": 0}, "layer 3: a convolution cannot have a tied weight"),
    ],
)
def test_layers_that_do_not_fit(layer: int, changes: dict[str, Any], message: str) -> None:
    spec = convolutional("pool")
    layers = [*spec.layers]
    layers[layer] = replace(layers[layer], **changes)
    with pytest.raises(ValueError, match=message):
        lower(replace(spec, layers=tuple(layers)), 4)


def test_what_convolutions_do_not_go_with() -> None:
    with pytest.raises(ValueError, match="the output layer takes no pooling"):
        lower(images((4, 4, 1), conv(2), conv(4, pool=2), latent=1), 4)
    with pytest.raises(ValueError, match="latent layer of a variational network is dense"):
        lower(replace(convolutional("gaussian"), latent=1), 4)
    for options in ({}, {"contractive_probes": 1, "contractive_hessian": 0.1}):
        with pytest.raises(ValueError, match=r"contractive=0.5.*not convolutions.*method='hutchinson' takes both"):
            lower(images((4, 4, 1), conv(2), 16, latent=1, contractive=0.5, **options), 4)
    spec = images((2, 2, 1), conv(1), 4, latent=1)
    tied = LayerSpec(4, 4, Activation.LINEAR, tied_to=0)
    with pytest.raises(ValueError, match="dense layer cannot be tied to a convolution"):
        lower(replace(spec, layers=(spec.layers[0], tied)), 4)


# --- ops ----------------------------------------------------------------------------------------------------


def applied(backend: str, spec: Any, state: dict[str, Array], X: Array, mode: Mode, dtype: Any = np.float64) -> Array:
    program = compile_plan(lower(spec, 5), backend, precision=dtype, n_threads=1)
    program.load({name: value.astype(dtype) for name, value in state.items()})
    out: Array = program.apply(X.reshape(len(X), -1).astype(dtype), mode)
    return out


@pytest.mark.parametrize("filters", [1, 5, 6, 7, 13])
def test_a_convolution_is_a_correlation(backend: str, filters: int) -> None:
    for width in (1, 2, 7, 15, 16, 17, 31, 33, 65):
        check_correlation(backend, width, filters)


def check_correlation(backend: str, width: int, filters: int) -> None:
    rng = np.random.default_rng(width)
    spec = images((3, width, 2), conv(filters, (3, 5)), 6 * width, latent=1)
    state = Case("correlation", spec).state()
    x = rng.normal(size=(3, 3, width, 2))
    found = applied(backend, spec, state, x, Mode.ENCODE).reshape(3, 3, width, filters)
    K = state["W0"].reshape(3, 5, 2, filters)
    for i, f in itertools.product(range(3), range(filters)):
        padded = np.pad(x[i], ((1, 1), (2, 2), (0, 0)))
        expected = correlate(padded, K[..., f], "valid")[:, :, 0] + state["b0"][0, f]
        np.testing.assert_allclose(found[i, :, :, f], expected, rtol=1e-10, atol=1e-10, err_msg=f"width {width}")


def test_the_first_of_the_greatest_takes_the_gradient(backend: str) -> None:
    """A pooling over equal values, seen in the gradient by the weight of a convolution of one pixel."""
    spec = images((2, 4, 2), conv(1, 1, pool=2), conv(2, 1, upsample=2), latent=1, solver=Solver.SGD)
    X = np.zeros((1, 2, 4, 2))
    X[0, :, :, 1] = [[1, 2, 3, 4], [5, 6, 7, 8]]
    program = compile_plan(lower(spec, 1), backend, precision="float64", n_threads=1)
    # The first channel alone is pooled, and is the same everywhere.
    program.load({"W0": np.array([[1.0], [0.0]]), "b0": np.ones(1), "W1": np.ones((1, 2)), "b1": np.zeros(2)})
    program.bind(X.reshape(1, -1))
    _, gradient = program.gradient(np.arange(1))
    # Windows begin at 1 and 3, where the error 2 (1 - x) is summed over both channels of their four pixels.
    d = [2 * (4 * 1 + 4 * 1 - sum(window)) for window in ((1, 2, 5, 6), (3, 4, 7, 8))]
    np.testing.assert_allclose(gradient["W0"][1, 0], 1 * d[0] + 3 * d[1])


def test_nan_comes_through_a_pooling(backend: str) -> None:
    spec = images((2, 6, 1), conv(1, 1, pool=2), conv(1, 1, upsample=2), latent=1)
    state = {"W0": np.ones((1, 1)), "b0": np.zeros(1), "W1": np.ones((1, 1)), "b1": np.zeros(1)}
    for y, x in itertools.product(range(2), range(6)):
        image = np.arange(12.0).reshape(1, 2, 6, 1)
        image[0, y, x] = np.nan
        found = applied(backend, spec, state, image, Mode.ENCODE)[0]
        np.testing.assert_array_equal(np.isnan(found), np.arange(3) == x // 2)


@pytest.mark.parametrize("name", ["contractive", "contractive-pool", "contractive-code", "contractive-back"])
def test_probes_estimate_the_squared_jacobian(backend: str, name: str) -> None:
    """The mean over many probes is the norm of Jacobians written out, within five standard errors."""
    spec = changed(convolutional(name), contractive_probes=4, contractive=1.0)
    spec = replace(spec, training=replace(spec.training, corruption=None))
    case = Case("probes", spec, batch=12, rows=12)
    square = np.square(jacobian(case, forward(case, np.arange(12), training=True))).sum(axis=(1, 2))
    weight = case.data().weight
    exact = float(np.mean(square if weight is None else square * weight))
    program = compile_plan(case.plan, backend, precision="float64", n_threads=1)
    program.load(case.state())
    program.bind(*case.data())
    at = program.plan.terms.index("contractive")
    drawn = np.array([program.gradient(np.arange(12), SEED, step)[0][at] for step in range(200)])
    error = drawn.std(ddof=1) / np.sqrt(len(drawn))
    assert 0 < error < 0.1 * exact
    assert abs(drawn.mean() - exact) <= 5 * error


@pytest.mark.parametrize("dtype", CPU_PRECISIONS, ids=str)
@pytest.mark.parametrize("name", ["pool", "stride", "all", "contractive", "contractive-pool"])
def test_bits_for_any_simulated_team(cpp: str, name: str, dtype: Precision) -> None:
    case = Case("team", convolutional(name), batch=70, rows=150)
    expected = agreement.bits(case, dtype=dtype)
    for n in (2, 3, 5, 7, 16, 17, 64):
        assert agreement.bits(case, dtype=dtype, simulate_threads=n) == expected, f"{n} simulated threads"


@pytest.mark.parametrize("size", [40, 90])
def test_images_larger_than_a_block_of_them(fast_backend: str, size: int) -> None:
    """The gradient of a weight is then summed over several blocks of a grain, down to one image at a time."""
    spec = images((size, size, 3), conv(4, 5, strides=2), conv(3, strides=2, transposed=True), latent=1)
    case = Case("large", spec, batch=19, rows=19)
    programs = [compile_plan(case.plan, name, precision="float64", n_threads=2) for name in (fast_backend, "reference")]
    found = []
    for program in programs:
        program.load(case.state())
        program.bind(case.data().X)
        found.append(program.gradient(np.arange(19), SEED, STEP)[1])
    for name, g in found[1].items():
        np.testing.assert_allclose(found[0][name], g, rtol=1e-9, atol=1e-9 * np.abs(g).max())


def test_flops() -> None:
    plan = lower(images((8, 8, 2), conv(5, strides=2), conv(2, strides=2, transposed=True), latent=1), 3)
    # forward and weight gradients of both, the input gradient of the second; 16 pixels, 9 * 2 * 5 weights each
    assert plan.flops == 5 * 2 * 3 * 16 * 9 * 2 * 5


def test_a_step_allocates_nothing(cpp: str) -> None:
    """Its memory is that of the plan and the threads: it stays where it is."""
    case = Case("memory", convolutional("pool"), batch=17, rows=17)
    program = compile_plan(case.plan, "cpp", n_threads=2)
    program.load(case.state(np.float32))
    program.bind(case.data(np.float32).X)
    at = program.arena().ctypes.data
    program.train(np.tile(np.arange(17), 50), Hyper(SEED, STEP, np.full(50, 1e-3)))
    assert program.arena().ctypes.data == at
