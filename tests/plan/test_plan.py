"""Lowering: operands are written before they are read, live slots share no memory, tables equal the plan."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import CASES, GRAM_CASES, MODEL_CASES
from narrows.backends import Hyper
from narrows.backends.reference import ReferenceProgram
from narrows.plan.lowering import lower
from narrows.plan.ops import LANES, SAME_SETS, SIGNATURES, OpCode, Units
from narrows.plan.plan import Mode, Op, Plan, Region, Slot
from narrows.plan.spec import Activation, Corruption, LayerSpec, Loss, NetworkSpec, Solver
from networks import Case, changed, network, specs

LEARN = Mode.GRADIENT | Mode.TRAIN
LAYERS = (OpCode.DENSE, OpCode.CONVOLVE, OpCode.MAXPOOL, OpCode.SPARSE_DENSE, OpCode.CONDITION)
JUDGES = (OpCode.LOSS, OpCode.GAUSSIAN, OpCode.COUNTS, OpCode.WEIGHT_GRAM, OpCode.SPARSE_MSE)
LINKS = (OpCode.LINK, OpCode.MEANS)
"""What makes what is asked for of the output layer, outside training."""
all_cases = pytest.mark.parametrize("case", CASES, ids=str)
model_cases = pytest.mark.parametrize("case", MODEL_CASES, ids=str)


def operands(op: Op) -> dict[str, int]:
    return {role: i for role, i in zip(SIGNATURES[op.code].slots, op.slots, strict=True) if i >= 0}


ACCUMULATED = {"accumulate_dz": {"dz"}, "accumulate_colrate": {"colrate"}}
"""Operands that an op reads only if it is told to; `accumulate` is of all that it writes."""


def in_place(op: Op) -> set[str]:
    """What an op rewrites whether it accumulates or not."""
    return {OpCode.SQUARED_NORM: {"x"}, OpCode.COTANGENT: {"dout"}}.get(op.code, set())


def reads(op: Op, mode: Mode) -> list[int]:
    """Slots whose contents the op depends on."""
    names = set(SIGNATURES[op.code].reads)
    if op.code in JUDGES and not mode & LEARN:
        names.discard("weight")  # it scales dz alone; scores are unweighted
    attributes = dict(zip(SIGNATURES[op.code].ints, op.ints, strict=True))
    for flag, held in {**ACCUMULATED, "accumulate": {*SIGNATURES[op.code].writes} - in_place(op)}.items():
        if attributes.get(flag) == 0:
            names -= held
    return [i for role, i in operands(op).items() if role in names]


def writes(op: Op) -> list[int]:
    names = SIGNATURES[op.code].writes
    return [i for role, i in operands(op).items() if role in names]


def memory(slot: Slot) -> tuple[str, int, int]:
    """The slot's place: a space, and the elements from .. to in it."""
    space = slot.region.name if slot.region < Region.BATCH else "WORK"
    return space, slot.offset, slot.offset + slot.size


def overlap(a: Slot, b: Slot) -> bool:
    (space, start, end), (other, other_start, other_end) = memory(a), memory(b)
    return space == other and start < other_end and other_start < end


def check_run(plan: Plan, mode: Mode) -> None:
    """Walk through the ops of a mode: each operand was written before, and shares no memory with another one."""
    # Parameters and optimiser state are loaded; the terms are zeroed by the program before a step.
    loaded = (Region.PARAMETER, Region.MOMENT1, Region.MOMENT2)
    valid = {i for i, s in enumerate(plan.slots) if s.region in loaded or s.name == "terms"}
    for position, op in enumerate(plan.ops):
        if not op.modes & mode:
            continue
        for i in reads(op, mode):
            assert i in valid, f"op {position} {op.code.name} reads {plan.slots[i].name}, not written in {mode}"
        slots = sorted(set(operands(op).values()))
        for i, j in itertools.combinations(slots, 2):
            assert not overlap(plan.slots[i], plan.slots[j]), (
                f"op {position} {op.code.name}: {plan.slots[i].name} and {plan.slots[j].name} share memory"
            )
        if op.code in (OpCode.SQNORM, OpCode.UPDATE):
            gradients = {i for i, s in enumerate(plan.slots) if s.region is Region.GRADIENT}
            assert gradients <= valid, "the update reads a gradient that was not written"
        for i in writes(op):
            valid -= {j for j in valid if j != i and overlap(plan.slots[i], plan.slots[j])}
            valid.add(i)
    if mode in plan.outputs:
        assert plan.outputs[mode] in valid, f"the result of {mode} does not outlive the run"


@all_cases
def test_a_plan_is_sound(case: Case) -> None:
    """Every mode reads only what was written, live slots share no memory, and tables and text equal the plan."""
    for mode in Mode:
        check_run(case.plan, mode)
    check_layout(case.plan)
    check_tables(case.plan)
    check_text(case.plan)
    check_streams(case.plan)
    check_modes(case)


@settings(max_examples=150, deadline=None)
@given(specs(), st.integers(1, 70))
def test_any_network_lowers_to_a_sound_plan(spec: NetworkSpec, batch: int) -> None:
    plan = lower(spec, batch)
    for mode in Mode:
        check_run(plan, mode)
    check_layout(plan)


def test_the_check_itself_finds_shared_memory_and_missing_writes() -> None:
    plan = next(c for c in MODEL_CASES if c.name == "penalty-all").plan
    first_activation = plan.index["a0"]
    moved = replace(plan, slots=tuple(replace(s, offset=0) if s.region is Region.BATCH else s for s in plan.slots))
    with pytest.raises(AssertionError, match=r"reads|share memory"):
        check_run(moved, Mode.TRAIN)
    writer = next(op for op in plan.ops if first_activation in writes(op))
    without = replace(plan, ops=tuple(op for op in plan.ops if op is not writer))
    with pytest.raises(AssertionError, match="reads a0, not written"):
        check_run(without, Mode.ENCODE)


def check_layout(plan: Plan) -> None:
    sizes = {"WORK": plan.work_size}
    for slot in plan.slots:
        assert slot.rows >= 1
        assert slot.cols >= 1
        assert slot.ld % LANES == 0
        assert slot.cols <= slot.ld < slot.cols + (LANES if slot.cols < SAME_SETS - LANES else 4 * LANES)
        assert slot.ld % SAME_SETS
        assert slot.offset % LANES == 0
        space, start, end = memory(slot)
        assert 0 <= start < end <= sizes.get(space, plan.parameter_size)
        if slot.region is Region.BATCH:
            assert slot.rows == plan.batch_rows
    flat = [s for s in plan.slots if s.region in (Region.PARAMETER, Region.GRADIENT, Region.SCRATCH)]
    for i, a in enumerate(flat):
        assert not any(overlap(a, b) for b in flat[i + 1 :]), f"{a.name} shares memory for good"
    # A parameter, its gradient and its state lie at the same offset, so that the update can be one flat loop.
    beside = ["d", *(f"moment{i + 1}." for i in range(plan.n_moments))]
    for slot, prefix in itertools.product(plan.learned, beside):
        other = plan.slots[plan.index[prefix + slot.name]]
        assert (other.offset, other.rows, other.cols) == (slot.offset, slot.rows, slot.cols)
    assert plan.arena_size == (2 + plan.n_moments) * plan.parameter_size + plan.work_size


def test_batch_memory_is_shared() -> None:
    """A target of its own, as wide as the input, makes room for the backward pass once the loss has read it."""
    wide = lower(network((640, 64, 16, 64, 640), separate_target=True), 32)
    size = {s.name: s.size for s in wide.slots if s.region is Region.BATCH}
    assert wide.work_size <= sum(size.values()) - size["d0"] - size["d1"] - size["d2"] + 64


class ArenaProgram(ReferenceProgram):
    """The reference over the arena as planned, in place of memory of its own for every slot."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        work = np.full(plan.work_size, np.nan)
        self.arrays = [
            array if slot.region < Region.BATCH else self._view(work, slot)
            for array, slot in zip(self.arrays, plan.slots, strict=True)
        ]


@model_cases
def test_the_planned_arena_gives_the_same_numbers(case: Case) -> None:
    data = case.data()
    rows, hyper = np.arange(case.rows), Hyper(5, 0, np.full(case.rows, 1e-2))
    programs = ArenaProgram(case.plan), ReferenceProgram(case.plan)
    for program in programs:
        program.load(case.state())
        program.bind(*data)
    arena, own = programs
    # A slot overwritten too early is wrong by much more; BLAS rounds by the strides it meets.
    same = partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-13)
    same(arena.train(rows, hyper), own.train(rows, hyper))
    for mode in (Mode.ENCODE, Mode.RECONSTRUCT, Mode.SCORE):
        same(*(p.apply(data.X, mode, data.target, data.condition) for p in programs))
    codes = own.apply(data.X, Mode.ENCODE)
    same(*(p.apply(codes, Mode.DECODE, condition=data.condition) for p in programs))
    for name, value in own.state().items():
        same(arena.state()[name], value, err_msg=name)


def check_tables(plan: Plan) -> None:
    """The tables that native code reads hold exactly the plan."""
    ops = []
    for row in plan.op_table():
        code = OpCode(row["code"])
        signature = SIGNATURES[code]
        n_slots, n_ints, n_floats = len(signature.slots), len(signature.ints), len(signature.floats)
        assert (row["slots"][n_slots:] == -1).all(), f"unused slots of {code.name}"
        ops.append(
            Op(
                code,
                Mode(int(row["modes"])),
                tuple(row["slots"][:n_slots].tolist()),
                tuple(row["ints"][:n_ints].tolist()),
                tuple(row["floats"][:n_floats].tolist()),
            )
        )
    assert tuple(ops) == plan.ops, "the table of ops"
    rebuilt = tuple(
        Slot(s.name, Region(region), rows, cols, offset)
        for s, (region, rows, cols, offset) in zip(plan.slots, plan.slot_table().tolist(), strict=True)
    )
    assert rebuilt == plan.slots, "the table of slots"


@settings(max_examples=30, deadline=None)
@given(specs(), st.integers(1, 70))
def test_lowering_is_deterministic(spec: NetworkSpec, batch: int) -> None:
    one, two = lower(spec, batch), lower(replace(spec), batch)
    assert one == two
    assert one.op_table().tobytes() == two.op_table().tobytes()
    assert str(one) == str(two)


def check_text(plan: Plan) -> None:
    """One line for each op, with its operands."""
    head, *lines = str(plan).splitlines()
    assert f"batch {plan.batch_rows}" in head
    assert len(lines) == len(plan.ops)
    for line, op in zip(lines, plan.ops, strict=True):
        assert op.code.name.lower() in line
        for role, i in operands(op).items():
            assert f" {role}={plan.slots[i].name}" in line
        assert len(line) < 320, line


def ops_of(plan: Plan, mode: Mode) -> list[Op]:
    return [op for op in plan.ops if op.modes & mode]


def check_modes(case: Case) -> None:
    """Each mode runs the ops that its name stands for: parts of the training step."""
    plan = case.plan
    train, gradient = ops_of(plan, Mode.TRAIN), ops_of(plan, Mode.GRADIENT)
    if case.spec.training.update.clip_norm is not None:
        assert gradient == [op for op in train if op.code not in (OpCode.SHRINK, OpCode.UPDATE, OpCode.KEEP)]
        assert train[-1].code is OpCode.UPDATE
    else:
        check_fusion(plan)
    encode, reconstruct, score = (ops_of(plan, m) for m in (Mode.ENCODE, Mode.RECONSTRUCT, Mode.SCORE))
    decode = ops_of(plan, Mode.DECODE)
    drawn = [OpCode.SAMPLE] * case.spec.variational
    encoder = [code for layer in case.spec.layers[: case.spec.latent] for code in forward_codes(layer)]
    normalized = case.spec.log_normalize
    if case.spec.data.shifted:  # told once for the batch, whatever it is for
        first, encode = encode[0], encode[1:]
        assert first.code is OpCode.SHIFT
        assert reconstruct[0] is score[0] is first
        reconstruct = reconstruct[1:]
    if case.spec.form.sparse_input:
        first = [OpCode.SIZE_SUM] * normalized + [OpCode.SPARSE_DENSE]
        assert [op.code for op in encode] == first + encoder[1:] + drawn
    else:
        taken = [OpCode.GATHER] + [OpCode.SIZE_SUM, OpCode.LOG_NORMALIZE] * normalized
        assert [op.code for op in encode] == taken + encoder + drawn
    # Decoding what was encoded is reconstructing; the codes come in place of the encoder, and of counts their sum.
    assert decode[0].code is OpCode.GATHER
    assert decode[0].ints == (3,)
    if case.spec.loss.info.of_counts:
        assert [op.code for op in reconstruct if op not in encode + decode] == [OpCode.SIZE_SUM] * (not normalized) + [
            OpCode.MEANS
        ]
        assert (operands(reconstruct[-1]).keys() ^ operands(decode[-1]).keys()) == {"size_sum"}
        reconstruct, bare = [op for op in reconstruct if op.code is not OpCode.MEANS], decode[:-1]
        assert set(encode + bare[1:]) == {op for op in reconstruct if op.code is not OpCode.SIZE_SUM or op in encode}
    else:
        assert encode + decode[1:] == reconstruct
    assert [op for op in score if op.code not in (*JUDGES, OpCode.SIZE_SUM, OpCode.SHIFT)] == [
        op
        # A chain from each row rebuilds it in training.
        for op in (plan.ops if case.spec.training.gibbs else train)
        if op.code in (OpCode.GATHER, OpCode.LOG_NORMALIZE, OpCode.SAMPLE, *LAYERS) and op.modes & Mode.SCORE
    ]
    posterior, likelihood = ops_of(plan, Mode.POSTERIOR), ops_of(plan, Mode.LIKELIHOOD)
    if case.spec.variational:
        assert [op for op in posterior if op.code is not OpCode.SHIFT] == [
            op for op in encode if op.code is not OpCode.SAMPLE
        ]
        after = [op for op in decode if op.code not in LINKS]
        judge = operands(likelihood[-1])
        held = judge.get("size_sum" if case.spec.loss.info.of_counts else "target")
        assert [op for op in likelihood if op.code not in (*JUDGES, OpCode.SHIFT) and op not in after] == [
            op for op in score if op.code in (OpCode.GATHER, OpCode.SIZE_SUM) and op.slots[-1] == held
        ]
    else:
        assert posterior == likelihood == []
    for op in encode + decode + reconstruct + score:
        assert op.code not in (OpCode.CORRUPT, OpCode.DROPOUT, OpCode.DRAW), "random at inference"


def forward_codes(layer: LayerSpec) -> list[OpCode]:
    if layer.convolution is None:
        return [OpCode.DENSE]
    return [OpCode.CONVOLVE] + [OpCode.MAXPOOL] * layer.convolution.pooled


def check_fusion(plan: Plan) -> None:
    """Training is the gradient's list, with the last of the ops that make each gradient replaced by one that also
    uses it up."""
    train = [op for op in plan.ops if op.modes & Mode.TRAIN and not op.modes & Mode.GRADIENT]
    gradient = [op for op in plan.ops if op.modes & Mode.GRADIENT and not op.modes & Mode.TRAIN]
    kinds = {layer.convolution is not None for layer in plan.spec.layers}
    by_kind = {False: {OpCode.WGRAD_UPDATE, OpCode.COLSUM_UPDATE}, True: {OpCode.GRAIN_UPDATE}}
    expected = set().union(*(by_kind[kind] for kind in kinds))
    if plan.spec.loss is Loss.GAUSSIAN:
        expected |= {OpCode.COLSUM_UPDATE}
    if "log_dispersion" in plan.spec.parameter_shapes:
        expected |= {OpCode.GRAIN_UPDATE}
    if plan.spec.form.sparse_input:
        expected |= {OpCode.SPARSE_WGRAD_UPDATE}
    if plan.spec.form.gram_decoder:
        expected |= {OpCode.SPARSE_MSE_UPDATE}
    inner = plan.spec.layers[int(plan.spec.form.sparse_input) : len(plan.spec.layers) - plan.spec.form.gram_decoder]
    if all(layer.tied_to is not None or layer.convolution is not None for layer in inner):
        expected -= {OpCode.WGRAD_UPDATE}
    if plan.spec.n_chains:
        expected |= {OpCode.KEEP}
    assert {op.code for op in train} == expected
    assert {op.code for op in gradient} <= {
        OpCode.WGRAD, OpCode.COLSUM, OpCode.DECAY, OpCode.COLUMN_DECAY, OpCode.GRAIN_SUM, OpCode.SPARSE_WGRAD,
        OpCode.SPARSE_MSE_WGRAD,
    }  # fmt: skip
    train = [op for op in train if op.code is not OpCode.KEEP]
    updated = [operands(op)["b" if op.code is OpCode.COLSUM_UPDATE else "W"] for op in train]
    updated += [operands(op)["b"] for op in train if op.code is OpCode.SPARSE_MSE_UPDATE]
    assert sorted(updated) == [plan.index[s.name] for s in plan.learned]
    unfused_of = {OpCode.WGRAD_UPDATE: OpCode.WGRAD, OpCode.SPARSE_WGRAD_UPDATE: OpCode.SPARSE_WGRAD}
    products = {(op.code, operands(op)["dW"]): op for op in gradient if op.code in unfused_of.values()}
    for op in train:
        if op.code in unfused_of:
            own = operands(op)
            unfused = products[unfused_of[op.code], plan.index["d" + plan.slots[own["W"]].name]]
            assert (own.get("x"), own["dz"]) == (operands(unfused).get("x"), operands(unfused)["dz"])
            if op.code is OpCode.SPARSE_WGRAD_UPDATE:
                assert (op.ints[1], op.floats[-2:]) == (unfused.ints[1], unfused.floats), "noise and scale"
                assert own.get("size_sum") == operands(unfused).get("size_sum")
                assert own.get("shift") == operands(unfused).get("shift")


@pytest.mark.parametrize("case", GRAM_CASES, ids=str)
def test_a_decoder_in_gram_form_needs_no_row_of_its_outputs(case: Case) -> None:
    plan, n_outputs = case.plan, case.spec.n_outputs
    judged = Mode.TRAIN | Mode.GRADIENT | Mode.SCORE | Mode.LIKELIHOOD
    assert "decoder in gram form" in str(plan)
    if n_outputs not in {layer.n_in for layer in case.spec.layers[case.spec.form.sparse_input :]}:
        slots = {plan.slots[i] for op in plan.ops if op.modes & judged for i in op.slots if i >= 0}
        assert not any(s.region is Region.BATCH and s.cols == n_outputs for s in slots)


@pytest.mark.parametrize(
    "wrong", [{"loss": Loss.HUBER}, {"output": Activation.SIGMOID}, {"tied": True}], ids=lambda wrong: next(iter(wrong))
)
def test_a_decoder_in_gram_form_is_linear_and_of_squared_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="gram_decoder needs squared error and a dense linear output layer"):
        lower(network((7, 4, 7), gram_decoder=True, **wrong), 8)


def check_streams(plan: Plan) -> None:
    """Each random op has a stream of its own."""
    forward = []
    for op in plan.ops:
        if op.code in JUDGES:
            break
        if op.code in (OpCode.CORRUPT, OpCode.DROPOUT, OpCode.SAMPLE):
            forward.append(op.ints[-1])
    forward += [op.ints[-1] for op in plan.ops if op.code is OpCode.DRAW]
    assert len(set(forward)) == len(forward), "two random ops share a stream"


def test_the_cases_use_everything() -> None:
    ops = [op for case in CASES for op in case.plan.ops]
    assert {op.code for op in ops} == set(OpCode)
    attributes = {
        (op.code, name, value) for op in ops for name, value in zip(SIGNATURES[op.code].ints, op.ints, strict=True)
    }
    hidden = set(Activation) - {Activation.SOFTMAX}
    every = (
        OpCode.DENSE, OpCode.DGRAD, OpCode.ACTIVITY_L1, OpCode.CONTRACTIVE, OpCode.SLOPES, OpCode.CURVES,
        OpCode.GAUSSIAN, OpCode.CONVOLVE, OpCode.CONV_DGRAD, OpCode.MAXPOOL_DGRAD, OpCode.SPARSE_DENSE,
        OpCode.SPARSE_MSE,
    )  # fmt: skip
    for code, values in ((code, hidden) for code in every):
        assert {v for c, name, v in attributes if (c, name) == (code, "activation")} == values
    products = OpCode.WGRAD_UPDATE, OpCode.SPARSE_WGRAD_UPDATE
    for code in (OpCode.UPDATE, OpCode.COLSUM_UPDATE, OpCode.GRAIN_UPDATE, OpCode.SPARSE_MSE_UPDATE, *products):
        assert {v for c, name, v in attributes if (c, name) == (code, "solver")} == set(Solver)
    for code, operand in itertools.product(products, ("dW", "penalty", "colrate")):
        assert {operand in operands(op) for op in ops if op.code is code} == {True, False}
    counted = {loss for loss in Loss if loss.info.of_counts}
    assert {v for c, name, v in attributes if (c, name) == (OpCode.LOSS, "loss")} == set(Loss) - {
        Loss.GAUSSIAN
    } - counted
    assert {v for c, name, v in attributes if (c, name) == (OpCode.COUNTS, "loss")} == counted
    for name in ("by_cell", "source"):
        assert {v for c, n, v in attributes if (c, n) == (OpCode.COUNTS, name)} == {0, 1}
    for code in (OpCode.SPARSE_DENSE, OpCode.SPARSE_WGRAD, OpCode.SPARSE_WGRAD_UPDATE, OpCode.MEANS):
        assert {"size_sum" in operands(op) for op in ops if op.code is code} == {True, False}
    sparse = OpCode.SPARSE_DENSE, OpCode.SPARSE_WGRAD, OpCode.SPARSE_WGRAD_UPDATE, OpCode.SPARSE_MSE_UPDATE
    for code in (OpCode.GATHER, *sparse):
        assert {"shift" in operands(op) for op in ops if op.code is code} == {True, False}
    assert {"b" in operands(op) for op in ops if op.code is OpCode.SHIFT} == {True, False}
    for code in (OpCode.SPARSE_MSE, OpCode.SPARSE_MSE_WGRAD, OpCode.SPARSE_MSE_UPDATE):
        assert {v for c, name, v in attributes if (c, name) == (code, "source")} == {0, 1}
    assert {v for c, name, v in attributes if (c, name) == (OpCode.CORRUPT, "kind")} == set(Corruption)
    for code in (OpCode.WGRAD, OpCode.CONV_WGRAD, OpCode.SPARSE_WGRAD):
        assert {v for c, name, v in attributes if (c, name) == (code, "accumulate")} == {0, 1}
    assert {v for c, name, v in attributes if (c, name) == (OpCode.GATHER, "source")} == {0, 1, 2, 3}
    assert {v for c, name, v in attributes if (c, name) == (OpCode.DRAW, "kind")} == set(Units)
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tied": True}, "cannot be conditioned on batches"),
        ({"n_conditions": 3}, "8 inputs for 3 latents and 3 batches"),
        ({"n_conditions": -1}, "8 inputs for 3 latents and -1 batches"),
        ({"variational": True, "n_conditions": 0}, "6 linear outputs for 8 latents"),
    ],
    ids=["tied", "more", "negative", "without"],
)
def test_a_conditioned_decoder_has_inputs_for_the_conditions(wrong: dict[str, Any], message: str) -> None:
    given = {"n_conditions": 5} | wrong
    spec = network((7, 6, 3, 6, 7), **(given | {"n_conditions": 0 if "tied" in wrong else 5}))
    with pytest.raises(ValueError, match=message):
        lower(changed(spec, n_conditions=given["n_conditions"]), 8)


def test_a_convolutional_decoder_cannot_be_conditioned() -> None:
    case = next(c for c in MODEL_CASES if c.name == "convolution-LINEAR")
    with pytest.raises(ValueError, match="convolutional"):
        lower(changed(case.spec, n_conditions=2), 8)


def test_terms_name_the_penalties() -> None:
    spec = network((5, 3, 5), latent=Activation.SIGMOID, activity_l1=1.0, kl_sparsity=1.0, weight_l1=1.0)
    assert lower(spec, 4).terms == ("loss", "activity_l1", "kl_sparsity", "weight_penalty")
    assert lower(network((5, 3, 5), solver=Solver.ADAMW, alpha=1.0), 4).terms == ("loss",)


def test_flops_count_the_products() -> None:
    layers = (LayerSpec(10, 4, Activation.RELU), LayerSpec(4, 10, Activation.LINEAR))
    # forward and wgrad of both layers, dgrad of the second, two operations a multiply-add
    assert lower(NetworkSpec(layers, 1), 8).flops == 2 * (2 * 8 * 40 + 3 * 8 * 40) // 1
