"""How each library trains a case, in the best ways that its users have.

Promises:

- Every contender starts from the case's weights, takes its batches in order with Adam, and returns each epoch's mean
  loss.
- Before the timing, data are in memory in the form that the library likes best.
- If a library has several ways to train, all are variants here, and the fastest one is its figure.

Never: a setting that an ordinary installation of the library does not have.

A contender is a generator of variants: a name, and a function that starts the training again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bench.libraries.cases import BETA_1, BETA_2, EPSILON, SEED, Case, ImageCase, SparseCase
from bench.support.harness import device
from narrows.backends import Hyper, compile_plan, resolve

ON_GPU = ("narrows", "pytorch", "pytorch-compile", "jax")
"""Contenders on a GPU."""

WHOLE_EPOCH = ("lax.scan over an epoch", "an epoch in one jit-compiled tf.function")
"""Ways that train a whole epoch of prepared batches in one compiled call, which few users write. The other ways are one
call for each step, or the library's own `fit`."""

Train = Callable[[int], list[float]]
"""Train for a number of epochs; returns the mean loss of each."""
Variants = Iterator[tuple[str, Callable[[], Train]]]


def program_of(case: Case, backend: str, threads: int) -> Any:
    """A compiled plan that holds the case's first parameters."""
    precision = {} if case.precision == "float32" else {"precision": case.precision}
    program = compile_plan(case.plan(), backend, n_threads=threads, **precision)
    program.load(case.parameters())
    return program


def _narrows(case: Case, threads: int, backend: str) -> Variants:
    def start() -> Train:
        program = program_of(case, backend, threads)
        X = case.data()
        program.bind(X)
        rows, rates, done = np.arange(X.shape[0]), np.full(case.steps, case.learning_rate), 0

        def train(epochs: int) -> list[float]:
            nonlocal done
            losses = []
            for _ in range(epochs):
                losses.append(float(program.train(rows, Hyper(SEED, done, rates)).sum(axis=1).mean()))
                done += case.steps
            return losses

        return train

    yield backend, start


def narrows(case: Case, threads: int) -> Variants:
    return _narrows(case, threads, resolve("auto"))


def narrows_numba(case: Case, threads: int) -> Variants:
    return _narrows(case, threads, "numba")


def _torch_images(case: ImageCase) -> Any:
    """The network of a case. PyTorch stores channels first, so its dense layers have another order of features."""
    import torch
    from torch import nn

    modules: list[nn.Module] = []
    shape: tuple[int, int, int] | None = (28, 28, 1)
    layers = case.spec.layers
    for i, (spec, W) in enumerate(zip(layers, case.weights(), strict=True)):
        conv = spec.convolution
        if conv is None:
            layer: Any = nn.Linear(spec.n_in, spec.n_out)
            if shape is not None:
                modules.append(nn.Flatten())
                W = W.reshape(*shape, -1).transpose(2, 0, 1, 3).reshape(spec.n_in, -1)
                shape = None
            after = layers[i + 1].convolution
            if after is not None:
                h, w, c = shape = after.shape
                W = W.reshape(-1, h, w, c).transpose(0, 3, 1, 2).reshape(-1, spec.n_out)
            weight = W.T
        else:
            K = W.reshape(*conv.kernel, conv.shape[2], conv.filters)
            common = (conv.shape[2], conv.filters, conv.kernel, conv.strides, conv.padding)
            if conv.transposed:
                layer = nn.ConvTranspose2d(*common, output_padding=1)
                weight = K.transpose(2, 3, 0, 1)
            else:
                layer = nn.Conv2d(*common)
                weight = K.transpose(3, 2, 0, 1)
            if conv.upsample != (1, 1):
                modules.append(nn.Upsample(scale_factor=conv.upsample))
            shape = conv.out_shape
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(weight.copy()))
            layer.bias.zero_()
        modules.append(layer)
        if i < len(layers) - 1:
            modules.append(nn.ReLU())
        if conv is not None and conv.pooled:
            modules.append(nn.MaxPool2d(conv.pool))
        if conv is None and shape is not None:
            h, w, c = shape
            modules.append(nn.Unflatten(1, (c, h, w)))
    return nn.Sequential(*modules)


class _Torch:
    """Model, criterion and batches of a case."""

    def __init__(self, case: Case, channels_last: bool = False) -> None:
        import torch
        from torch import nn

        self.case, self.torch, self.device = case, torch, device()
        # Products have the precision of the case on every device.
        torch.set_float32_matmul_precision("high" if case.precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = case.precision == "tf32"
        if isinstance(case, ImageCase):
            self.model = _torch_images(case).to(self.device)
            images = torch.from_numpy(case.data()).reshape(-1, 1, 28, 28).to(self.device)
            if channels_last:
                self.model = self.model.to(memory_format=torch.channels_last)
                images = images.contiguous(memory_format=torch.channels_last)
            self.batches = images.split(case.batch)
            return
        modules: list[nn.Module] = []
        for W in case.weights():
            layer = nn.Linear(*W.shape)
            with torch.no_grad():
                layer.weight.copy_(torch.from_numpy(W.T))
                layer.bias.zero_()
            modules += [layer, nn.ReLU()]
        self.model = nn.Sequential(*modules[:-1]).to(self.device)
        self.batches = torch.from_numpy(case.dense()).to(self.device).split(case.batch)

    def loss(self, x: Any, model: Callable[[Any], Any] | None = None) -> Any:
        """Mean over rows of the sum over features."""
        torch, f = self.torch, self.torch.nn.functional
        criterion = f.binary_cross_entropy_with_logits if self.case.loss == "bce" else f.mse_loss
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.case.precision == "bfloat16"):
            z = (model or self.model)(x)
        return criterion(z.float(), x, reduction="sum") / len(x)

    def epochs(self, step: Callable[[Any], Any]) -> Train:
        return lambda n: [self.torch.stack([step(x) for x in self.batches]).mean().item() for _ in range(n)]

    def with_optimizer(self, graphed: bool = False, **options: Any) -> Train:
        """Loss and gradients, eager or compiled with `options`, then the library's fused Adam; optionally all of it in
        one CUDA graph."""
        torch = self.torch
        adam = torch.optim.Adam(
            self.model.parameters(),
            lr=self.case.learning_rate,
            betas=(BETA_1, BETA_2),
            eps=EPSILON,
            fused=True,
            capturable=graphed,
        )
        loss = torch.compile(self.loss, fullgraph=True, dynamic=False, **options) if options else self.loss

        def step(x: Any) -> Any:
            adam.zero_grad()
            value = loss(x)
            value.backward()
            adam.step()
            # The library's own graphs return the same memory in each call.
            return value.detach().clone() if self.device == "cuda" else value.detach()

        return self.epochs(self.captured(step, adam) if graphed else step)

    def captured(self, step: Callable[[Any], Any], adam: Any) -> Callable[[Any], Any]:
        """A training step as a CUDA graph, as PyTorch's manual describes; the network keeps its first weights."""
        torch = self.torch
        x, before = self.batches[0].clone(), [p.detach().clone() for p in self.model.parameters()]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            value = step(x)
        with torch.no_grad():
            for p, first in zip(self.model.parameters(), before, strict=True):
                p.copy_(first)
            for state in adam.state.values():
                for moment in state.values():
                    moment.zero_()

        def replay(batch: Any) -> Any:
            x.copy_(batch)
            graph.replay()
            return value.clone()

        return replay

    def whole_step(self, **options: Any) -> Train:
        """Loss, gradients and update in one compiled graph."""
        torch = self.torch
        names = [name for name, _ in self.model.named_parameters()]
        weights = [p.detach().clone() for p in self.model.parameters()]
        first, second = ([torch.zeros_like(p) for p in weights] for _ in range(2))
        count = torch.zeros((), device=self.device)

        def loss(weights: list[Any], x: Any) -> Any:
            state = dict(zip(names, weights, strict=True))
            return self.loss(x, lambda x: torch.func.functional_call(self.model, state, (x,)))

        def step(x: Any) -> Any:
            gradients, value = torch.func.grad_and_value(loss)(weights, x)
            count.add_(1)
            rate, root = self.case.learning_rate / (1 - BETA_1**count), torch.sqrt(1 - BETA_2**count)
            for p, m, v, g in zip(weights, first, second, gradients, strict=True):
                m.lerp_(g, 1 - BETA_1)
                v.mul_(BETA_2).addcmul_(g, g, value=1 - BETA_2)
                p.sub_(rate * m / (v.sqrt() / root + EPSILON))
            return value

        compiled = torch.compile(step, fullgraph=True, dynamic=False, **options)
        # As in `with_optimizer`.
        kept = (lambda x: compiled(x).clone()) if self.device == "cuda" else compiled
        train: Train = torch.no_grad()(self.epochs(kept))
        return train


_TUNED: dict[str, Any] = {"options": {"max_autotune": True, "cpp_wrapper": True}}


def pytorch(case: Case, threads: int) -> Variants:
    _torch_threads(threads)
    yield "fused Adam", lambda: _Torch(case).with_optimizer()
    if device() == "cuda":
        yield "fused Adam, in a CUDA graph", lambda: _Torch(case).with_optimizer(graphed=True)
    if isinstance(case, ImageCase):
        yield "fused Adam, channels last", lambda: _Torch(case, True).with_optimizer()


def pytorch_compile(case: Case, threads: int) -> Variants:
    _torch_threads(threads)
    if device() == "cuda":
        yield "reduce-overhead, fused Adam", lambda: _Torch(case).with_optimizer(mode="reduce-overhead")
        yield (
            "loss and gradients compiled, fused Adam, in a CUDA graph",
            lambda: _Torch(case).with_optimizer(graphed=True, mode="default"),
        )
        yield "the whole step compiled, reduce-overhead", lambda: _Torch(case).whole_step(mode="reduce-overhead")
        return
    yield "loss and gradients compiled, fused Adam", lambda: _Torch(case).with_optimizer(mode="default")
    yield "the same with max_autotune and cpp_wrapper", lambda: _Torch(case).with_optimizer(**_TUNED)
    yield "the whole step compiled, max_autotune and cpp_wrapper", lambda: _Torch(case).whole_step(**_TUNED)
    if isinstance(case, ImageCase):
        yield "loss and gradients compiled, channels last", lambda: _Torch(case, True).with_optimizer(mode="default")


def _torch_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def jax(case: Case, threads: int) -> Variants:
    """JAX uses as many threads as the affinity mask has CPUs."""
    import jax
    import jax.numpy as jnp

    compute = jnp.dtype("bfloat16" if case.precision == "bfloat16" else "float32")
    # On GPUs, JAX computes float32 products in TF32 by default.
    jax.config.update("jax_default_matmul_precision", "tensorfloat32" if case.precision == "tf32" else "highest")

    def loss(state: list[Any], x: Any) -> Any:
        z = x
        for i, (W, b) in enumerate(state):
            z = jnp.dot(z.astype(compute), W.astype(compute), preferred_element_type=jnp.float32) + b
            z = jax.nn.relu(z) if i < len(state) - 1 else z
        errors = jnp.logaddexp(z, 0) - z * x if case.loss == "bce" else (z - x) ** 2
        return errors.sum() / len(x)

    def step(carry: Any, x: Any) -> Any:
        p, m, v, count = carry
        value, g = jax.value_and_grad(loss)(p, x)
        count = count + 1
        m = jax.tree.map(lambda m, g: BETA_1 * m + (1 - BETA_1) * g, m, g)
        v = jax.tree.map(lambda v, g: BETA_2 * v + (1 - BETA_2) * g * g, v, g)
        rate, root = case.learning_rate / (1 - BETA_1**count), jnp.sqrt(1 - BETA_2**count)
        p = jax.tree.map(lambda p, m, v: p - rate * m / (jnp.sqrt(v) / root + EPSILON), p, m, v)
        return (p, m, v, count), value

    def start(whole_epoch: bool) -> Train:
        p = [(jnp.asarray(W), jnp.zeros(W.shape[1])) for W in case.weights()]
        zeros = jax.tree.map(jnp.zeros_like, (p, p))
        carry: Any = (p, *zeros, jnp.zeros(()))
        batches = jnp.asarray(case.dense()).reshape(case.steps, case.batch, -1)
        scan = jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches), donate_argnums=0)
        one, singles = jax.jit(step, donate_argnums=0), list(batches)

        def train(epochs: int) -> list[float]:
            nonlocal carry
            losses = []
            for _ in range(epochs):
                if whole_epoch:
                    carry, values = scan(carry, batches)
                else:
                    values = []
                    for x in singles:
                        carry, value = one(carry, x)
                        values.append(value)
                # All at once: a GPU would transfer them one by one.
                losses.append(np.mean(jax.device_get(values)).item())
            return losses

        return train

    yield "lax.scan over an epoch", lambda: start(True)
    yield "a call for each step", lambda: start(False)


def keras(case: Case, threads: int) -> Variants:
    import keras
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    keras.mixed_precision.set_global_policy("float32" if case.precision == "float32" else "mixed_bfloat16")

    def loss(x: Any, z: Any) -> Any:
        z = tf.cast(z, tf.float32)
        bce = case.loss == "bce"
        errors = tf.nn.sigmoid_cross_entropy_with_logits(x, z) if bce else tf.math.squared_difference(x, z)
        return tf.reduce_sum(errors, axis=-1)

    def model_and_optimizer() -> tuple[Any, Any]:
        hidden = len(case.widths) - 2
        layers = [keras.layers.Dense(n, "relu" if i < hidden else None) for i, n in enumerate(case.widths[1:])]
        model = keras.Sequential([keras.Input(case.widths[:1]), *layers])
        for layer, W in zip(layers, case.weights(), strict=True):
            layer.set_weights([W, np.zeros(W.shape[1], np.float32)])
        return model, keras.optimizers.Adam(case.learning_rate, BETA_1, BETA_2, EPSILON)

    def fit(cached: bool) -> Train:
        model, optimizer = model_and_optimizer()
        model.compile(optimizer, loss, jit_compile=True, steps_per_execution=case.steps)
        X = tf.constant(case.dense())
        data: dict[str, Any] = {"x": X, "y": X, "batch_size": case.batch, "shuffle": False}
        if cached:
            data = {"x": tf.data.Dataset.from_tensor_slices((X, X)).batch(case.batch).cache().prefetch(2)}
        return lambda epochs: model.fit(**data, epochs=epochs, verbose=0).history["loss"]

    def loop() -> Train:
        model, optimizer = model_and_optimizer()
        optimizer.build(model.trainable_variables)
        batches = tf.reshape(case.dense(), (case.steps, case.batch, -1))

        @tf.function(jit_compile=True)  # type: ignore[untyped-decorator]
        def epoch() -> Any:
            total = tf.constant(0.0)
            for i in tf.range(case.steps):
                with tf.GradientTape() as tape:
                    value = tf.reduce_mean(loss(batches[i], model(batches[i], training=True)))
                gradients = tape.gradient(value, model.trainable_variables)
                optimizer.apply(gradients, model.trainable_variables)
                total += value
            return total / case.steps

        return lambda epochs: [float(epoch()) for _ in range(epochs)]

    yield "fit, jit_compile, steps_per_execution", lambda: fit(False)
    yield "the same from a cached tf.data.Dataset", lambda: fit(True)
    yield "an epoch in one jit-compiled tf.function", loop


def numpy(case: Case, threads: int) -> Variants:
    """NumPy alone, written by hand. Its products run in BLAS, with as many threads as the affinity mask has CPUs."""
    bce = case.loss == "bce"

    def start() -> Train:
        layers = [(W, np.zeros(W.shape[1], np.float32)) for W in case.weights()]
        state = [p for layer in layers for p in layer]
        moments = [(np.zeros_like(p), np.zeros_like(p)) for p in state]
        batches = np.split(case.dense(), case.steps)
        done = 0

        def gradients(x: Any) -> tuple[float, list[Any]]:
            outputs = [x]
            for W, b in layers[:-1]:
                outputs.append(np.maximum(outputs[-1] @ W + b, 0))
            W, b = layers[-1]
            z = outputs[-1] @ W + b
            if bce:
                e = np.exp(-np.abs(z))
                losses, dz = np.maximum(z, 0) - z * x + np.log1p(e), np.where(z < 0, e, 1) / (1 + e) - x
            else:
                losses, dz = np.square(z - x), 2 * (z - x)
            dz, found = dz / len(x), []
            for i in reversed(range(len(layers))):
                found += [dz.sum(axis=0), outputs[i].T @ dz]
                if i:
                    dz = (dz @ layers[i][0].T) * (outputs[i] > 0)
            return float(losses.sum()) / len(x), found[::-1]

        def step(x: Any) -> float:
            nonlocal done
            done += 1
            loss, found = gradients(x)
            rate, root = case.learning_rate / (1 - BETA_1**done), (1 - BETA_2**done) ** 0.5
            for p, (m, v), g in zip(state, moments, found, strict=True):
                m += (1 - BETA_1) * (g - m)
                v += (1 - BETA_2) * (g * g - v)
                p -= rate * m / (np.sqrt(v) / root + EPSILON)
            return loss

        return lambda epochs: [float(np.mean([step(x) for x in batches])) for _ in range(epochs)]

    yield "by hand", start


CONTENDERS: dict[str, Callable[[Case, int], Variants]] = {
    "narrows": narrows,
    "narrows-numba": narrows_numba,
    "pytorch": pytorch,
    "pytorch-compile": pytorch_compile,
    "jax": jax,
    "keras": keras,
    "numpy": numpy,
}


def taking_part(case: Case) -> list[str]:
    """The contenders that can train a case."""
    missing = {
        ImageCase: ("jax", "keras", "numpy"),
        SparseCase: ("narrows-numba", "keras", "numpy"),
    }.get(type(case), () if case.precision == "float32" else ("narrows-numba", "numpy"))
    return [name for name in CONTENDERS if name not in missing]
