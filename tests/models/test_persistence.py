"""Durable files and the model format: old or new but never torn, and the same content or an error."""

from __future__ import annotations

import json
import math
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from narrows.errors import ModelFileError, OutputError
from narrows.persistence import atomic_write, load_tensors, save_tensors

TENSORS = {
    "W": np.array([[1.5, -2.0], [np.nan, np.inf]], np.float32),
    "b": np.array([1, 2], np.int64),
    "step": np.array(7.25),
    "none": np.empty((0, 3), np.float32),
    "mask": np.array([True, False, True]),
    "bytes": np.array([0, 255], np.uint8),
}
META = {
    "n_components": 2,
    "tol": math.nan,
    "layers": (8, (4,)),
    "names": ["a", "é"],
    "deep": {"low": -math.inf},
}


def assert_same(tensors, meta, expected=TENSORS, expected_meta=META):
    assert tensors.keys() == expected.keys()
    for name, array in expected.items():
        assert tensors[name].dtype == array.dtype
        assert tensors[name].shape == array.shape
        assert tensors[name].tobytes() == array.tobytes()
    assert repr(meta) == repr(expected_meta)  # order of keys, types and NaN included


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.safetensors"
    save_tensors(path, TENSORS, META, kind="model")
    return path


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# --- atomic_write


def test_writes_bytes_and_callables(tmp_path):
    path = tmp_path / "f"
    atomic_write(path, b"one")
    assert path.read_bytes() == b"one"
    atomic_write(str(path), lambda stream: stream.write(b"two"))
    assert path.read_bytes() == b"two"
    assert leftovers(tmp_path) == ["f"]


@pytest.mark.skipif(os.name == "nt", reason="no umask on Windows")
def test_mode_is_less_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        atomic_write(tmp_path / "f", b"")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640


def test_symbolic_link_is_followed(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    atomic_write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


@pytest.mark.parametrize("call", ["open", "fdopen", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
def test_a_failing_call_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, call, error):
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error)) as caught:
        atomic_write(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert leftovers(tmp_path) == ["f"]
    if isinstance(error, OSError):
        assert isinstance(caught.value, OutputError)
        assert caught.value.errno == 28
        assert str(caught.value) == f"cannot write {path}: No space left on device"


@pytest.mark.parametrize("n", [0, 1])
def test_either_fsync_failing_is_an_error_and_nothing_is_torn(tmp_path, monkeypatch, n):
    path, calls, real = tmp_path / "f", [], os.fsync
    path.write_bytes(b"old")

    def fail_nth(descriptor):
        calls.append(descriptor)
        if len(calls) == n + 1:
            raise OSError(5, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fail_nth)
    with pytest.raises(OutputError, match="Input/output error"):
        atomic_write(path, b"new")
    assert len(calls) == n + 1  # file and folder are both flushed
    assert path.read_bytes() == (b"old", b"new")[n]  # the folder is flushed after the move
    assert leftovers(tmp_path) == ["f"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(28, "full")])
def test_a_failing_writer_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def write(stream):
        stream.write(b"half of the n")
        stream.flush()
        raise error

    with pytest.raises(type(error)):
        atomic_write(path, write)
    assert path.read_bytes() == b"old"
    assert leftovers(tmp_path) == ["f"]


def test_impossible_places_are_output_errors(tmp_path):
    with pytest.raises(OutputError, match="No such file or directory"):
        atomic_write(tmp_path / "absent" / "f", b"")
    with pytest.raises(OutputError, match="it is a folder"):
        atomic_write(tmp_path, b"")
    assert leftovers(tmp_path) == []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_sigkill_leaves_an_old_or_a_new_model(tmp_path):
    path = tmp_path / "model.safetensors"
    save_tensors(path, {"W": np.zeros(1)}, {"i": -1}, kind="model")
    code = (
        "import sys, numpy as np\nfrom narrows.persistence import save_tensors\n"
        "print('ready', flush=True)\n"
        "for i in range(10**9): save_tensors(sys.argv[1], {'W': np.full(5000, i)}, {'i': i}, kind='model')\n"
    )
    pause = np.random.default_rng(0)
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
        with process:
            assert process.stdout.readline() == b"ready\n"
            time.sleep(pause.uniform(0.01, 0.08))
            process.send_signal(signal.SIGKILL)
        tensors, meta = load_tensors(path, kind="model")
        assert (tensors["W"] == max(meta["i"], 0)).all()


# --- the model format


def test_round_trip(model):
    tensors, meta = load_tensors(model, kind="model")
    assert_same(tensors, meta)
    for array in tensors.values():
        assert array.flags.writeable
        assert array.flags.owndata
    assert meta["layers"] == (8, (4,))


def test_other_programs_read_it(model):
    from safetensors.numpy import load_file

    assert_same(load_file(model), META)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's here")
def test_saving_needs_no_room_for_a_copy(tmp_path):
    """Memory is shortest just when the checkpoint of a run that is stopped for it is written."""
    code = (
        "import resource, sys, numpy as np\nfrom narrows.persistence import load_tensors, save_tensors\n"
        "save_tensors(sys.argv[1], {'W': np.zeros(3)}, {}, kind='model'); load_tensors(sys.argv[1], kind='model')\n"
        "tensors = {f'W{i}': np.full(4_000_000, i, np.float32) for i in range(8)}\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (32 << 20),) * 2)\n"
        "save_tensors(sys.argv[1], tensors, {}, kind='model')\n"
    )
    path = tmp_path / "model.safetensors"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=120)
    tensors, _ = load_tensors(path, kind="model")
    assert [array[-1] for _, array in sorted(tensors.items())] == list(range(8))


def test_same_content_gives_the_same_bytes(tmp_path, model):
    save_tensors(tmp_path / "again", dict(reversed(TENSORS.items())), dict(META), kind="model")
    assert (tmp_path / "again").read_bytes() == model.read_bytes()


def test_any_layout_is_stored_plainly(tmp_path):
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    layouts = {"F": np.asfortranarray(base), "T": base.T, "step": base[::-2, ::3], "big": base.astype(">f4")}
    save_tensors(tmp_path / "m", layouts, {}, kind="model")
    tensors, _ = load_tensors(tmp_path / "m", kind="model")
    for name, array in layouts.items():
        np.testing.assert_array_equal(tensors[name], array)
        assert tensors[name].flags.c_contiguous
        assert tensors[name].dtype.isnative


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.text(max_size=5).filter(str.isprintable),
)
KEYS = st.text("abc", max_size=3)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.tuples(inner, inner), st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=8,
)
ARRAYS = hnp.arrays(
    st.sampled_from(["f2", "f4", "f8", "?", "u1", "i1", "i2", "u4", "i8"]).map(np.dtype),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tensors=st.dictionaries(st.text("xyz.é", max_size=4), ARRAYS, max_size=4),
    meta=st.dictionaries(KEYS, VALUES, max_size=4),
)
def test_round_trip_of_anything(tmp_path, tensors, meta):
    save_tensors(tmp_path / "m", tensors, meta, kind="any")
    assert_same(*load_tensors(tmp_path / "m", kind="any"), tensors, meta)


def test_metadata_is_one_strict_json_text(model):
    content = model.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert set(header["__metadata__"]) == {"narrows"}
    envelope = json.loads(header["__metadata__"]["narrows"], parse_constant=pytest.fail)
    assert set(envelope) == {"format", "kind", "version", "meta", "sha256"}
    assert envelope["format"] == 1


def test_numpy_scalars_become_numbers(tmp_path):
    save_tensors(tmp_path / "m", {}, {"i": np.int32(3), "f": np.float32(0.5), "b": np.bool_(True)}, kind="model")
    _, meta = load_tensors(tmp_path / "m", kind="model")
    assert meta == {"i": 3, "f": 0.5, "b": True}
    assert [type(meta[key]) for key in "ifb"] == [int, float, bool]


@pytest.mark.parametrize(
    ("tensors", "meta", "message"),
    [
        ({"W": np.array([None])}, {}, "tensor 'W' has dtype object"),
        ({"W": np.array(["a"])}, {}, "tensor 'W' has dtype <U1"),
        ({"W": np.array([1j])}, {}, "tensor 'W' has dtype complex128"),
        ({"__metadata__": np.zeros(1)}, {}, "cannot be the name"),
        ({}, {"a": [1, {"f": print}]}, r"meta\.a\[1\]\.f is a builtin_function_or_method"),
        ({}, {"a": np.zeros(2)}, r"meta\.a is a ndarray"),
        ({}, {"a": {3: 1}}, r"meta\.a: 3 cannot be a key"),
        ({}, {"a": {"__tuple__": 1}}, "'__tuple__' cannot be a key"),
    ],
)
def test_what_cannot_be_stored_is_named(tmp_path, tensors, meta, message):
    with pytest.raises(TypeError, match=message):
        save_tensors(tmp_path / "m", tensors, meta, kind="model")
    assert leftovers(tmp_path) == []


def test_every_bit_flip_and_truncation_is_an_error_or_the_same_content(tmp_path):
    path = tmp_path / "m"
    tensors = {"W": np.array([[1.5, -2.0]], np.float32), "n": np.array(3, np.uint8)}
    meta = {"a": (1, math.nan), "s": "x"}
    save_tensors(path, tensors, meta, kind="model")
    content = path.read_bytes()
    refused, messages = 0, set()
    variants = [content[:length] for length in range(len(content))]
    variants += [content + b"\0", content + content]
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        variants.append(bytes(damaged))
    for variant in variants:
        path.write_bytes(variant)
        try:
            loaded = load_tensors(path, kind="model")
        except ModelFileError as error:
            messages.add(str(error))
            refused += 1
        else:
            assert_same(*loaded, tensors, meta)
    assert refused > 0.95 * len(variants)
    assert all(message.startswith(f"{path}: ") and "\n" not in message for message in messages)


def rewrite(path: Path, change) -> None:
    """Apply `change` to the header of a model file, as an object."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    envelope = json.loads(header["__metadata__"]["narrows"])
    change(header, envelope)
    if "narrows" in header.get("__metadata__", {}):
        header["__metadata__"]["narrows"] = json.dumps(envelope)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, e: e.update(format=2, version="9.1"), "format 2, written by narrows 9.1, is newer"),
        (lambda h, e: e.update(format=10**4000), "is newer"),
        (lambda h, e: e.update(format="1"), "damaged: format number '?1'?"),
        (lambda h, e: e.update(format=True), "damaged: format number"),
        (lambda h, e: e.pop("format"), "damaged: format number None"),
        (lambda h, e: e.update(kind="checkpoint"), "holds a checkpoint, not a 'model'"),
        (lambda h, e: e.update(sha256="0" * 64), "does not match its checksum"),
        (lambda h, e: e.pop("sha256"), "does not match its checksum"),
        (lambda h, e: e["meta"].update(n_components=3), "does not match its checksum"),
        (lambda h, e: e.update(version="0.0.9"), "does not match its checksum"),
        (lambda h, e: e.update(meta=[]), "does not match its checksum"),
        (lambda h, e: h.update(V=h.pop("W")), "does not match its checksum"),
        (lambda h, e: h["__metadata__"].pop("narrows"), "safetensors of another program"),
        (lambda h, e: h.pop("__metadata__"), "safetensors of another program"),
        (lambda h, e: h["W"].update(shape=[2**62, 2**62]), "damaged: "),
        (lambda h, e: h["W"].update(shape=[2**63, 2]), "damaged: "),
        (lambda h, e: h["W"].update(data_offsets=[0, 2**63]), "damaged: "),
        (lambda h, e: h["W"].update(shape=[4, 1]), "does not match its checksum"),
        (lambda h, e: h["W"].update(dtype="I32"), "does not match its checksum"),
        (lambda h, e: h["W"].update(dtype="BF16"), "damaged: "),
    ],
)
def test_forged_headers_are_refused(model, change, message):
    rewrite(model, change)
    with pytest.raises(ModelFileError, match=message):
        load_tensors(model, kind="model")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x07" * 7,
        b"\xff" * 64,
        (2**40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"17",
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
        (100_000).to_bytes(8, "little") + b'{"a":' * 20_000,
        (10_000).to_bytes(8, "little") + b"9" * 10_000,
        b"\x80\x04\x95 a pickle, by its first bytes",
        b"PK\x03\x04" + b"\0" * 60,
    ],
    ids=range(12),
)
def test_foreign_files_are_refused(tmp_path, content):
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(ModelFileError, match="not a model file"):
        load_tensors(tmp_path / "m", kind="model")


def test_deep_settings_are_refused(model):
    content = model.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    for text in ('{"format":1,"kind":"model","meta":' + "[" * 100_000, "[" * 900 + "]" * 900, "NaN", "{"):
        header["__metadata__"]["narrows"] = text
        forged = json.dumps(header).encode()
        model.write_bytes(len(forged).to_bytes(8, "little") + forged + content[8 + size :])
        with pytest.raises(ModelFileError, match="the settings are not JSON"):
            load_tensors(model, kind="model")


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300), st.booleans())
def test_random_bytes_are_refused(tmp_path, content, framed):
    if framed:
        content = len(content).to_bytes(8, "little") + content
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(ModelFileError):
        load_tensors(tmp_path / "m", kind="model")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such model file"):
        load_tensors(tmp_path / "absent", kind="model")
    with pytest.raises(ModelFileError, match="is a folder"):
        load_tensors(tmp_path, kind="model")


def test_oversized_meta_is_refused_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr("narrows.persistence._HEADER_LIMIT", 4096)
    with pytest.raises(TypeError, match="meta is too large"):
        save_tensors(tmp_path / "m", {}, {"names": ["gene"] * 2000}, kind="model")
    assert leftovers(tmp_path) == []
