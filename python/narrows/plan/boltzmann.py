"""Lowering of restricted Boltzmann machines: Gibbs chains, and the two phases of their learning rule.

Promises: means are the model's conditional expectations, and states are drawn from its conditional distributions. The
update uses an estimate of the gradient of the mean of -log p(v) over the rows of the step.
Never: touches data or knows a backend.

The model: p(v, h) ~ exp(-E), E = -v'Wh - b'h - c'v for binary units; a Gaussian unit u, of variance 1, adds u**2 / 2.
Given the other layer, units are independent with means sigmoid(b + W'v) or b + W'v, and likewise c + Wh. The gradient
of -log p(v) by W is E[v h'] of the model minus E[v h'] of the data. n Gibbs steps estimate the first. They begin at the
row itself (CD-n), or they continue chains from update to update (PCD-n). In both, the last hidden units enter by their
means. Sources: Hinton, "Training products of experts by minimizing contrastive divergence", Neural Computation 14,
2002; Tieleman, "Training restricted Boltzmann machines using approximations to the likelihood gradient", ICML 2008.

With v, h of the row and v~, h~ of the chain, v~'h~ - v'h = (v~ - v)'h~ + v'(h~ - h). So the two layers with the
tied weight have the inputs v and h~ and the deltas h~ - h and v~ - v. The rest is the backward pass of any tied
network, with the same fused updates, decays, and solvers.
"""

from __future__ import annotations

from .oplist import OpList
from .ops import OpCode, Units
from .plan import LEARN, Mode
from .spec import Activation, Gibbs, LayerSpec, NetworkSpec, Penalties

__all__ = ["check_boltzmann", "write_phases"]

UNITS = {Activation.SIGMOID: Units.BERNOULLI, Activation.LINEAR: Units.GAUSSIAN}


def check_boltzmann(spec: NetworkSpec, batch_rows: int) -> None:
    """Raise ValueError if the network is not a restricted Boltzmann machine.

    Raises
    ------
    ValueError
        The network does not have two layers with one weight. An activation is not sigmoid or linear. An option is for
        autoencoders only. There are fewer chains than rows of a step.
    """
    layers = spec.layers
    gibbs = spec.training.gibbs
    assert gibbs is not None
    if len(layers) != 2 or layers[1].tied_to != 0 or any(layer.activation not in UNITS for layer in layers):
        raise ValueError(
            f"n_gibbs={gibbs.n_steps}: a Boltzmann machine has two layers with one weight, sigmoid or linear, not "
            + ", ".join(f"{layer.n_in}-{layer.n_out} {layer.activation.name.lower()}" for layer in layers)
        )
    foreign = {
        f"corruption={spec.training.corruption!r}": spec.training.corruption is not None,
        "separate_target=True": spec.data.separate_target,
        "variational=True": spec.variational,
        f"loss={spec.loss.info.name!r}": spec.loss.info.op is not OpCode.LOSS,
    }
    found = [name for name, given in foreign.items() if given] + on_codes(spec.training.penalties)
    if found:
        raise ValueError(f"n_gibbs={gibbs.n_steps}: {', '.join(found)} has no meaning for a Boltzmann machine")
    if 0 < gibbs.n_chains < batch_rows:
        raise ValueError(f"n_chains={gibbs.n_chains} must not be less than the rows of a step, {batch_rows}")


def on_codes(penalties: Penalties) -> list[str]:
    """The penalties on codes that are not 0, as ``name=value``."""
    names = "activity_l1", "kl_sparsity", "contractive", "contractive_hessian"
    return [f"{name}={getattr(penalties, name):g}" for name in names if getattr(penalties, name) > 0]


def write_phases(
    low: OpList, spec: NetworkSpec, gibbs: Gibbs, W: str, visible: str, hidden: str, weight: str | None, rowloss: str
) -> tuple[list[str], dict[int, str]]:
    """Write the chains and both phases of a step.

    Parameters
    ----------
    low : OpList
    spec : NetworkSpec
    gibbs : Gibbs
    W : str
        Slot of the weight.
    visible, hidden : str
        Slots of the rows, and of the means of the hidden units given them.
    weight : str or None
        Slot of the rows' weights.
    rowloss : str
        Slot for the losses of the first reconstructions. Chains that continue reconstruct no row.

    Returns
    -------
    inputs : list of str
        Slots of the layers' inputs.
    deltas : dict of int to str
        Slots of the deltas, from which the parameters' gradients follow.
    """
    up, down = spec.layers

    def drawn(mean: str, layer: LayerSpec, name: str) -> str:
        out = low.rows(name, layer.n_out)
        low.op(OpCode.DRAW, LEARN, {"mean": mean, "out": out}, kind=UNITS[layer.activation], stream=low.stream())
        return out

    def mean(x: str, layer: LayerSpec, b: str, name: str, pre: str | None = None) -> str:
        out = low.rows(name, layer.n_out)
        slots = {"x": x, "W": W, "b": b, "out": out, "pre": pre}
        low.op(OpCode.DENSE, LEARN, slots, activation=layer.activation, transposed=layer is down)
        return out

    h = "chain" if gibbs.n_chains else hidden
    for step in range(gibbs.n_steps):
        states = drawn(h, up, f"hidden{step}")
        rebuilt = low.rows("rebuilt", down.n_out) if step == 0 and not gibbs.n_chains else None
        v = mean(states, down, "b1", f"visible{step}", rebuilt)
        if rebuilt is not None:
            low.op(
                OpCode.LOSS,
                LEARN,
                {"z": rebuilt, "target": visible, "weight": weight, "rowloss": rowloss},
                loss=spec.loss,
                activation=down.activation,
                delta=spec.huber_delta,
            )
        if gibbs.sample_visible:
            v = drawn(v, down, f"state{step}")
        h = mean(v, up, "b0", f"mean{step}")
    deltas = {}
    for i, (late, early) in enumerate(((h, hidden), (v, visible))):
        deltas[i] = low.rows(f"d{i}", spec.layers[i].n_out)
        low.op(OpCode.CONTRAST, LEARN, {"x": late, "y": early, "weight": weight, "out": deltas[i]})
    if gibbs.n_chains:
        low.op(OpCode.KEEP, Mode.TRAIN, {"x": h, "out": "chain"})
    return [visible, h], deltas
