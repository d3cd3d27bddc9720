"""The native safetensors reader and writer against the `safetensors` package, bit for bit."""

from __future__ import annotations

import errno
import gc
import json
import os
import struct
import threading
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from vramkit import _core
from vramkit.errors import CheckpointError

# Every dtype that both torch and the format have, by the format's name. torch packs two F4 elements
# into one of its own, so the format's last dimension is twice torch's.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
# These came to torch later than the oldest version that is supported.
for _name, _torch_name in (("F8_E8M0", "float8_e8m0fnu"), ("F4", "float4_e2m1fn_x2")):
    if hasattr(torch, _torch_name):
        DTYPES[_name] = getattr(torch, _torch_name)

SHAPES: list[tuple[int, ...]] = [(), (1,), (7,), (3, 5), (2, 1, 4), (0,), (3, 0, 2)]


def element_bytes(dtype: torch.dtype) -> int:
    return torch.empty(1, dtype=dtype).element_size()


def random_bits(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Any bit pattern, NaN payloads and negative zeros included; a bool has only two."""
    count = 1
    for dim in shape:
        count *= dim
    generator = torch.Generator().manual_seed(seed)
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, high, (count * element_bytes(dtype),), generator=generator)
    return raw.to(torch.uint8).view(dtype).reshape(shape)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    if tensor.numel() == 0:
        return b""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def format_shape(dtype_name: str, shape: tuple[int, ...]) -> list[int]:
    dims = list(shape)
    if dtype_name == "F4":
        dims[-1] *= 2
    return dims


def native_load(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Everything in a file as the native reader sees it: name -> (dtype, shape, bytes)."""
    file = _core.SafetensorsFile(path)
    found = {}
    for info in file.tensors():
        buffer = torch.full((max(info.nbytes, 1),), 0xA5, dtype=torch.uint8)
        file.read_into(info.name, buffer.data_ptr(), info.nbytes)
        found[info.name] = (info.dtype, info.shape, raw_bytes(buffer[: info.nbytes]))
    return found


def build(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def all_tensors() -> dict[str, tuple[str, torch.Tensor]]:
    tensors = {}
    for number, (name, dtype) in enumerate(DTYPES.items()):
        for shape in SHAPES:
            if name == "F4" and not shape:
                continue  # torch's packed pair has no 0-d form in the format
            tensors[f"{name}.{'x'.join(map(str, shape))}"] = (
                name,
                random_bits(dtype, shape, number * 100 + len(shape)),
            )
    return tensors


def test_reads_what_the_package_writes(tmp_path: Path) -> None:
    tensors = all_tensors()
    path = tmp_path / "theirs.safetensors"
    metadata = {"format": "pt", 'é\n"\\': "\U0001f600/\t"}
    save_file({key: tensor for key, (_, tensor) in tensors.items()}, path, metadata)
    file = _core.SafetensorsFile(path)
    assert file.metadata() == metadata
    assert sorted(file.names()) == sorted(tensors)
    assert len(file) == len(tensors)
    assert file.file_bytes == path.stat().st_size
    found = native_load(path)
    for key, (name, tensor) in tensors.items():
        expected = (name, format_shape(name, tuple(tensor.shape)), raw_bytes(tensor))
        assert found[key] == expected, key


def test_the_package_reads_what_we_write(tmp_path: Path) -> None:
    tensors = all_tensors()
    path = tmp_path / "ours.safetensors"
    metadata = {"format": "pt", 'é\n"\\': "\U0001f600/\t"}
    specs = [(k, name, format_shape(name, tuple(t.shape))) for k, (name, t) in tensors.items()]
    with _core.SafetensorsWriter(path, specs, metadata) as writer:
        assert writer.tensors()[0].begin % 4096 == 0
        for key, (_, tensor) in reversed(tensors.items()):
            writer.write(key, tensor.data_ptr(), tensor.numel() * tensor.element_size())
        writer.commit()
        assert writer.committed
    assert os.listdir(tmp_path) == [path.name]
    assert path.stat().st_size == writer.file_bytes
    loaded = load_file(path)
    assert set(loaded) == set(tensors)
    for key, (_, tensor) in tensors.items():
        assert loaded[key].dtype == tensor.dtype, key
        assert loaded[key].shape == tensor.shape, key
        assert raw_bytes(loaded[key]) == raw_bytes(tensor), key
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == metadata
    assert [info.name for info in _core.SafetensorsFile(path).tensors()] == list(tensors)


@pytest.mark.parametrize("name", sorted(_core.safetensors_dtypes()))
def test_dtypes_are_the_packages(name: str) -> None:
    bits = _core.safetensors_dtypes()[name]
    header = {"t": {"dtype": name, "shape": [8], "data_offsets": [0, bits]}}
    data = os.urandom(bits)
    ((_, theirs),) = safetensors.deserialize(build(json.dumps(header).encode(), data))
    assert (theirs["dtype"], theirs["shape"], bytes(theirs["data"])) == (name, [8], data)
    assert _core.safetensors_bytes(name, [8]) == bits


def test_dtypes_miss_none_of_the_packages() -> None:
    header = {"t": {"dtype": "?", "shape": [], "data_offsets": [0, 0]}}
    with pytest.raises(Exception, match="expected one of") as caught:
        safetensors.deserialize(build(json.dumps(header).encode()))
    listed = str(caught.value).split("expected one of", 1)[1]
    theirs = {part.strip("`") for part in listed.split(" at line")[0].replace(" ", "").split(",")}
    assert theirs == set(_core.safetensors_dtypes())


def test_parts_in_and_out(tmp_path: Path) -> None:
    tensor = random_bits(torch.float32, (257, 33), 1)
    total = tensor.numel() * 4
    path = tmp_path / "parts.safetensors"
    with _core.SafetensorsWriter(path, [("w", "F32", tensor.shape)]) as writer:
        for begin in range(0, total, 1000):
            size = min(1000, total - begin)
            writer.write("w", tensor.data_ptr() + begin, size, offset=begin)
        writer.commit()
    assert raw_bytes(load_file(path)["w"]) == raw_bytes(tensor)
    back = torch.zeros(total, dtype=torch.uint8)
    file = _core.SafetensorsFile(path)
    for begin in range(0, total, 777):
        size = min(777, total - begin)
        file.read_into("w", back.data_ptr() + begin, size, offset=begin, drop_cache=True)
    assert raw_bytes(back) == raw_bytes(tensor)


def test_info_and_repr(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(2, 3)}, path)
    file = _core.SafetensorsFile(str(path))
    info = file.info("w")
    assert (info.name, info.dtype, info.shape, info.nbytes) == ("w", "F32", [2, 3], 24)
    assert (info.begin, info.end) == (path.stat().st_size - 24, path.stat().st_size)
    assert repr(info).startswith("TensorInfo(name='w', dtype='F32', shape=[2, 3], nbytes=24")
    assert file.path == path
    assert "w" in file
    assert "v" not in file
    assert str(path) in repr(file)
    assert "1 tensors" in repr(file)
    assert _core.SafetensorsFile(os.fsencode(path)).names() == ["w"]


def test_errors_have_the_right_types(tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    save_file({"w": torch.ones(4)}, good)
    file = _core.SafetensorsFile(good)
    room = torch.zeros(16, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="no tensor 'v'"):
        file.info("v")
    with pytest.raises(ValueError, match="has 16 bytes, but the destination has 8"):
        file.read_into("w", room.data_ptr(), 8)
    with pytest.raises(ValueError, match="null pointer"):
        file.read_into("w", 0, 16)
    with pytest.raises(ValueError, match="do not lie within"):
        file.read_into("w", room.data_ptr(), 8, offset=9)
    with pytest.raises(TypeError):
        file.read_into("w", -1, 16)
    with pytest.raises(FileNotFoundError) as missing:
        _core.SafetensorsFile(tmp_path / "absent")
    assert missing.value.errno == errno.ENOENT
    assert "absent" in str(missing.value)
    with pytest.raises(CheckpointError, match="a folder"):
        _core.SafetensorsFile(tmp_path)
    (tmp_path / "short").write_bytes(b"123")
    with pytest.raises(CheckpointError, match="short: the file has 3 bytes"):
        _core.SafetensorsFile(tmp_path / "short")
    with pytest.raises(NotADirectoryError, match="bytes are needed"):
        _core.SafetensorsWriter(good / "below", [])
    with pytest.raises(IsADirectoryError):
        _core.SafetensorsWriter(tmp_path, [])
    with pytest.raises(ValueError, match="declared twice"):
        _core.SafetensorsWriter(good, [("a", "U8", [1]), ("a", "U8", [1])])
    with pytest.raises(ValueError, match="unknown dtype 'float32'"):
        _core.SafetensorsWriter(good, [("a", "float32", [1])])
    assert load_file(good)["w"].tolist() == [1.0] * 4


def test_a_path_that_is_not_utf8(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.safetensors"
    try:
        with _core.SafetensorsWriter(path, [("a", "U8", [1])]) as writer:
            byte = torch.tensor([7], dtype=torch.uint8)
            writer.write("a", byte.data_ptr(), 1)
            writer.commit()
    except OSError as error:  # some file systems store only UTF-8 names
        if error.errno not in (errno.EILSEQ, errno.EINVAL):
            raise
        pytest.skip("this file system stores only UTF-8 names")
    assert _core.SafetensorsFile(path).names() == ["a"]
    with open(path, "ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match=r"caf\\xe9"):
        _core.SafetensorsFile(path)


def test_truncated_while_open(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"layer.weight": torch.ones(1000)}, path)
    file = _core.SafetensorsFile(path)
    os.truncate(path, path.stat().st_size - 1)
    room = torch.zeros(1000)
    with pytest.raises(CheckpointError, match=r"'layer\.weight'.*shorter after it was opened"):
        file.read_into("layer.weight", room.data_ptr(), 4000)


@pytest.mark.parametrize("way", ["exception", "no commit", "dropped", "discard"])
def test_nothing_is_left_without_commit(tmp_path: Path, way: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(4)}, path)
    before = path.read_bytes()
    data = torch.zeros(4)
    writer = _core.SafetensorsWriter(path, [("w", "F32", [4])])
    writer.write("w", data.data_ptr(), 16)
    assert len(os.listdir(tmp_path)) == 2
    if way == "exception":
        with pytest.raises(KeyboardInterrupt), writer:
            raise KeyboardInterrupt
    elif way == "no commit":
        with writer:
            pass
    elif way == "dropped":
        del writer
        gc.collect()
    else:
        writer.discard()
    assert os.listdir(tmp_path) == [path.name]
    assert path.read_bytes() == before


def test_commit_wants_every_byte_once(tmp_path: Path) -> None:
    data = torch.zeros(4)
    with _core.SafetensorsWriter(tmp_path / "a", [("w", "F32", [4]), ("e", "F32", [0])]) as writer:
        writer.write("w", data.data_ptr(), 8)
        with pytest.raises(ValueError, match="'w' is not complete: 8 of 16 bytes"):
            writer.commit()
        with pytest.raises(ValueError, match="were written before"):
            writer.write("w", data.data_ptr(), 16)
        with pytest.raises(ValueError, match="was not declared"):
            writer.write("x", data.data_ptr(), 0)
        writer.write("w", data.data_ptr() + 8, 8, offset=8)
        writer.commit()
    with pytest.raises(ValueError, match="is finished"):
        writer.commit()
    assert load_file(tmp_path / "a")["w"].tolist() == [0.0] * 4


def test_a_file_over_the_limit_of_the_process(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="limits of a process are POSIX")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    data = torch.zeros(1_000_000, dtype=torch.uint8)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # Python ignores SIGXFSZ
    try:
        with (
            pytest.raises(OSError, match="1004096 bytes are needed") as caught,
            _core.SafetensorsWriter(tmp_path / "a", [("w", "U8", [1_000_000])]) as writer,
        ):
            writer.write("w", data.data_ptr(), 1_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert os.listdir(tmp_path) == []


def test_reading_releases_the_interpreter(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensor = torch.arange(8 << 20).view(torch.uint8)  # 64 MiB
    save_file({"w": tensor}, path)
    file = _core.SafetensorsFile(path)
    buffers = [torch.zeros_like(tensor) for _ in range(2)]
    ticks = 0
    threads = [
        threading.Thread(target=file.read_into, args=("w", b.data_ptr(), b.numel()))
        for b in buffers
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        ticks += 1
        threads[0].join(0.0005)
        threads[1].join(0.0005)
    # With the lock held through both reads this thread could not run before they were done.
    assert ticks > 2
    assert all(torch.equal(b, tensor) for b in buffers)


# Hypothesis: whatever a header becomes, we refuse it or agree with the package.

_BASE = json.dumps(
    {
        "__metadata__": {"format": "pt", "k": "é"},
        "layer.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "F4", "shape": [6], "data_offsets": [24, 27]},
        "c\u20ac": {"dtype": "BF16", "shape": [], "data_offsets": [27, 29]},
        "d": {"dtype": "I64", "shape": [0, 5], "data_offsets": [29, 29]},
    }
).encode()
_DATA = bytes(range(29))
_PIECES = [
    text.encode()
    for text in [
        "{",
        "}",
        "[",
        "]",
        '"',
        ",",
        ":",
        "-",
        ".",
        "e",
        "\\",
        "0",
        "1",
        "24",
        "29",
        "null",
        "F32",
        "F16",
        "U8",
        "é",
    ]
]
_PIECES += [b" ", b"\n", b"\t", b"\x00", b"\xff", b"\\u0000", b"\\ud83d", b"\\u0061", b'"b"']
_PIECES += [b"9223372036854775808", b"18446744073709551616"]
_PIECES += [
    b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},',
    b'"b":{"dtype":"U8","shape":[0],"data_offsets":[29,29]},',
]

_edit = st.tuples(
    st.sampled_from(["replace", "insert", "delete", "copy"]),
    st.integers(0, len(_BASE) - 1),
    st.integers(0, 12),
    st.sampled_from(_PIECES) | st.binary(min_size=1, max_size=2),
)


def _mutate(edits: list[tuple[str, int, int, bytes]]) -> bytes:
    header = bytearray(_BASE)
    for kind, at, length, piece in edits:
        at = min(at, len(header))
        if kind == "replace":
            header[at : at + len(piece)] = piece
        elif kind == "insert":
            header[at:at] = piece
        elif kind == "delete":
            del header[at : at + length]
        else:
            header[at:at] = header[max(0, at - 40) : max(0, at - 40) + length]
    return bytes(header)


def _agree(path: Path, raw: bytes) -> bool:
    """True if both readers accept the file with the same content, False if we refuse it."""
    path.write_bytes(raw)
    try:
        ours = native_load(path)
    except CheckpointError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert path.name in refusal
        return False
    theirs = {
        name: (view["dtype"], list(view["shape"]), bytes(view["data"]))
        for name, view in safetensors.deserialize(raw)
    }
    assert ours == theirs
    with safetensors.safe_open(path, "pt") as file:
        assert (file.metadata() or {}) == _core.SafetensorsFile(path).metadata()
    return True


def test_the_unchanged_header_agrees(tmp_path: Path) -> None:
    assert _agree(tmp_path / "m.safetensors", build(_BASE, _DATA))
    assert _agree(tmp_path / "m.safetensors", build(_BASE + b"  \n", _DATA))


@settings(
    max_examples=1500,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the folder may be reused
)
@given(edits=st.lists(_edit, min_size=1, max_size=3))
def test_changed_headers_are_refused_or_agree(
    tmp_path: Path, edits: list[tuple[str, int, int, bytes]]
) -> None:
    _agree(tmp_path / "m.safetensors", build(_mutate(edits), _DATA))


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the folder may be reused
)
@given(
    length=st.integers(0, 2**64 - 1) | st.integers(0, len(_BASE) + 40),
    cut=st.integers(0, len(_BASE) + len(_DATA) + 8),
    extra=st.binary(max_size=4),
)
def test_changed_lengths_are_refused_or_agree(
    tmp_path: Path, length: int, cut: int, extra: bytes
) -> None:
    path = tmp_path / "m.safetensors"
    whole = build(_BASE, _DATA)
    _agree(path, struct.pack("<Q", length) + whole[8:])
    assert _agree(path, whole[:cut]) == (cut == len(whole))
    assert _agree(path, whole + extra) == (not extra)
