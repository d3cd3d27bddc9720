"""Storage formats against independent references: bitsandbytes, torch's casts, plain formulas."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator

import bitsandbytes.functional as bnb
import pytest
import torch
import vramkit
from conftest import RunPython
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from vramkit import _core
from vramkit._operators import StoredParts, encode

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BUILTIN = [name for name, _ in _core.builtin_formats()]
INT4 = [(n, vramkit.get_format(n).block) for n in BUILTIN if n.startswith("int4")]
# Rows that are blocks, rows that share blocks, odd sizes, less than one block, one element.
SHAPES = [(64, 128), (33, 100), (7, 63), (3, 5), (1, 1), (5, 64), (129,), (4, 3, 40), (2, 1, 96)]


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    """Formats that a test registers do not reach the next one."""
    from vramkit.formats import _REGISTRY

    before = dict(_REGISTRY)
    yield
    _REGISTRY.clear()
    _REGISTRY.update(before)


def f32(part: Tensor) -> Tensor:
    return part.reshape(-1).view(torch.float32)


def nibbles(codes: Tensor, count: int) -> Tensor:
    """4-bit codes of one flat run of bytes, the first in the high nibble."""
    flat = codes.reshape(-1)
    return torch.stack([flat >> 4, flat & 15], -1).reshape(-1)[:count].long()


def difficult(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random weights with empty, subnormal, huge and one-valued blocks among them."""
    x = torch.randn(shape, dtype=torch.float64)
    flat = x.view(-1)
    for first, value in ((64, 0.0), (128, 1e-41), (192, 1e30), (256, 1e-30), (320, -0.0)):
        if flat.numel() >= first + 64:
            flat[first : first + 64] *= value
    flat[::17] = 0.0
    if flat.numel() > 500:
        flat[400] = 3.0e38
        flat[450:470] = flat[449]
    if dtype == torch.float16:
        x = x.clamp(-6e4, 6e4)
    return x.to(dtype)


def scaled(flat: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(absmax by block, x * (1 / absmax) by element) in float32, as docs/formats.md says."""
    padded = nn.functional.pad(flat.float(), (0, -flat.numel() % block)).reshape(-1, block)
    absmax = padded.abs().amax(-1)
    inverse = 1.0 / absmax.clamp(min=1e-38)
    return absmax, (padded * inverse[:, None]).clamp(-1, 1).reshape(-1)[: flat.numel()]


class TestBitsandbytes:
    """NF4 and FP4 bit for bit as the installed package writes them."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("name", ["nf4", "fp4"])
    def test_codes_and_absmax(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.compare(name, difficult(shape, dtype))

    @pytest.mark.parametrize("name", ["nf4", "fp4"])
    @pytest.mark.parametrize("count", [64 * 200, 63])
    def test_values_beside_thresholds(self, name: str, count: int) -> None:
        table = torch.tensor(vramkit.get_format(name).native.table).sort().values
        bounds = (table[1:] + table[:-1]) / 2
        for _ in range(20):
            x = torch.empty(math.ceil(count / 64), 64)
            absmax = torch.rand(x.shape[0], 1) * 3 + 1e-3
            near = bounds[torch.randint(len(bounds), x.shape)] * absmax
            x = near
            for _ in range(2):
                x = torch.nextafter(x, x + torch.randint(-1, 2, x.shape))
            x[:, 0] = absmax[:, 0]
            self.compare(name, x.reshape(-1)[:count])

    @settings(max_examples=100, deadline=None)
    @given(
        st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1),
        st.sampled_from(["nf4", "fp4"]),
    )
    def test_any_finite_floats(self, values: list[float], name: str) -> None:
        self.compare(name, torch.tensor(values, dtype=torch.float32))

    def compare(self, name: str, x: Tensor) -> None:
        packed, state = bnb.quantize_4bit(x, quant_type=name)
        ours = encode(x, vramkit.get_format(name))
        count = x.numel()
        tail = count % 64
        theirs_absmax, ours_absmax = state.absmax.clone(), f32(ours.scales)
        if tail and ours_absmax[-1] < 1e-38:
            # Its last short block stores the lower clamp of its divisor instead of the absmax.
            assert theirs_absmax[-1] == torch.tensor(1e-38)
            theirs_absmax[-1] = ours_absmax[-1]
        assert torch.equal(ours_absmax.view(torch.int32), theirs_absmax.view(torch.int32))
        theirs, mine = nibbles(packed, count), nibbles(ours.codes, count)
        whole = count - tail
        assert torch.equal(mine[:whole], theirs[:whole])
        if tail % 2 == 0 or not tail:
            assert ours.codes.numel() == packed.numel()
        differs = (mine != theirs).nonzero().flatten()
        if not len(differs):
            return
        # Its last short block divides where all others multiply by the reciprocal. Two quotients
        # within 2 ulp of each other may have a threshold between them, and only then codes differ.
        flat = x.reshape(-1).float()
        divisor = flat[whole:].abs().max().clamp(min=1e-38)
        product, quotient = flat[differs] * (1.0 / divisor), flat[differs] / divisor
        apart = product.view(torch.int32).long() - quotient.view(torch.int32).long()
        assert apart.abs().max() <= 2
        table = torch.tensor(vramkit.get_format(name).native.table).sort().values
        bounds = (table[1:] + table[:-1]) / 2
        low, high = torch.minimum(product, quotient), torch.maximum(product, quotient)
        between = (low[:, None] <= bounds) & (bounds <= high[:, None])
        assert bool(between.any(-1).all())
        expected = torch.bucketize(product, bounds)
        assert torch.equal(
            table[expected], torch.tensor(vramkit.get_format(name).native.table)[mine[differs]]
        )

    @pytest.mark.parametrize("name", ["nf4", "fp4"])
    def test_table(self, name: str) -> None:
        ours = torch.tensor(vramkit.get_format(name).native.table)
        assert torch.equal(ours, bnb.get_4bit_type(name, device="cpu"))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("name", ["nf4", "fp4"])
    def test_decoded_values(self, name: str, dtype: torch.dtype) -> None:
        x = difficult((64, 128), dtype).clamp(-1e4, 1e4)
        packed, state = bnb.quantize_4bit(x, quant_type=name)
        ours = encode(x, vramkit.get_format(name)).dense(torch.float32)
        state.dtype = torch.float32
        assert torch.equal(ours, bnb.dequantize_4bit(packed, state))

    def test_dynamic_map(self) -> None:
        """Within 2 ulp: torch's linspace, which theirs is made of, may fuse its multiply-add."""
        ours = torch.tensor(_core.dynamic_map())
        theirs = bnb.create_dynamic_map()
        steps = ours.view(torch.int32) - theirs.view(torch.int32)
        assert ours.dtype == theirs.dtype == torch.float32
        assert len(ours) == len(theirs) == 256
        assert steps.abs().max() <= 2

    @pytest.mark.parametrize("shape", [(64, 128), (300, 384), (33, 100), (256, 65)], ids=str)
    def test_double_quantization(self, shape: tuple[int, ...]) -> None:
        x = torch.randn(shape)
        _, state = bnb.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
        fmt = vramkit.get_format("nf4_dq")
        ours = encode(x, fmt)
        assert ours.extra is not None
        outer, offset = f32(ours.extra)[:-1], f32(ours.extra)[-1]
        plain = encode(x, vramkit.get_format("nf4"))
        assert torch.equal(ours.codes.reshape(-1), plain.codes.reshape(-1))
        assert torch.equal(outer, state.state2.absmax)
        assert offset == state.offset
        table = torch.tensor(_core.dynamic_map())
        centred = f32(plain.scales) - offset
        mine, theirs = ours.scales.reshape(-1).long(), state.absmax.reshape(-1).long()
        exact = centred.double() / outer.double().repeat_interleave(256)[: centred.numel()]
        miss = (table[mine].double() - exact).abs()
        # Nearest in float32: the quotient and the midpoint are rounded (2 roundings, 1/2 ulp each).
        slack = 2 * 2.0**-24 * exact.abs()
        assert bool((miss <= (table[theirs].double() - exact).abs() + slack).all())
        nearest = (table.double() - exact[:, None]).abs().amin(-1)
        assert bool((miss <= nearest + slack).all())
        # Its quantizer looks the code up in a coarse grid: it is right almost always.
        assert float((mine == theirs).double().mean()) > 0.98
        absmax = table[mine] * outer.repeat_interleave(256)[: mine.numel()] + offset
        codes = nibbles(ours.codes, x.numel())
        scale = absmax.repeat_interleave(64)[: x.numel()]
        expected = torch.tensor(fmt.native.table)[codes] * scale
        assert torch.equal(ours.dense(torch.float32).reshape(-1), expected)

    def test_errors_are_no_larger(self) -> None:
        x = torch.randn(300, 384)
        for name, nested in (("nf4", False), ("nf4_dq", True), ("fp4", False)):
            packed, state = bnb.quantize_4bit(x, quant_type=name[:3], compress_statistics=nested)
            theirs = (bnb.dequantize_4bit(packed, state) - x).norm()
            ours = (encode(x, vramkit.get_format(name)).dense(torch.float32) - x).norm()
            assert ours <= theirs * (1 + 1e-5)  # the nested codes nearer, the rest equal


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("name", "target", "most"),
    [("fp8", torch.float8_e4m3fn, 448.0), ("fp8_e5m2", torch.float8_e5m2, 57344.0)],
)
def test_fp8_is_torchs_cast(
    name: str, target: torch.dtype, most: float, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = difficult(shape, dtype)
    ours = encode(x, vramkit.get_format(name))
    matrix = x.float().reshape(shape[0] if len(shape) > 1 else 1, -1)
    absmax = matrix.abs().amax(-1)
    smallest = torch.finfo(torch.float32).tiny
    # A number divided by a tensor is a product with the reciprocal in torch: two roundings.
    factor = (torch.full_like(absmax, most) / absmax.clamp(min=smallest)).clamp(
        max=torch.finfo(torch.float32).max
    )
    in_range = (matrix * factor[:, None]).clamp(-most, most)
    assert torch.equal(f32(ours.scales), absmax / most)
    assert torch.equal(ours.codes.reshape(matrix.shape), in_range.to(target).view(torch.uint8))
    decoded = ours.codes.reshape(matrix.shape).view(target).float() * (absmax / most)[:, None]
    assert torch.equal(ours.dense(torch.float32).reshape(matrix.shape), decoded)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = difficult(shape, dtype)
    ours = encode(x, vramkit.get_format("int8_dynamic"))
    matrix = x.float().reshape(shape[0] if len(shape) > 1 else 1, -1)
    absmax = matrix.abs().amax(-1)
    smallest = torch.finfo(torch.float32).tiny
    factor = (torch.full_like(absmax, 127) / absmax.clamp(min=smallest)).clamp(
        max=torch.finfo(torch.float32).max
    )
    codes = (matrix * factor[:, None]).round().clamp(-127, 127)  # round: half to even
    assert torch.equal(f32(ours.scales), absmax / 127)
    assert torch.equal(ours.codes.reshape(matrix.shape).view(torch.int8).float(), codes)
    assert torch.equal(
        ours.dense(torch.float32).reshape(matrix.shape), codes * (absmax / 127)[:, None]
    )


@pytest.mark.parametrize("name", ["fp16", "bf16"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_casts_are_torchs(name: str, dtype: torch.dtype) -> None:
    fmt = vramkit.get_format(name)
    assert fmt.storage_dtype is not None
    x = difficult((40, 33), dtype)
    ours = encode(x, fmt)
    assert torch.equal(ours.codes.view(torch.int16), x.to(fmt.storage_dtype).view(torch.int16))
    assert ours.scales.numel() == 0
    assert ours.extra is None


class TestInt4:
    @staticmethod
    def decode(parts: StoredParts, rows: int, cols: int, group: int) -> Tensor:
        """(code - zero) * scale, spelled out on the bytes."""
        groups = math.ceil(cols / group)
        assert parts.extra is not None
        codes = nibbles(parts.codes, parts.codes.numel() * 2).reshape(rows, -1)[:, :cols]
        scale = parts.scales.reshape(-1).view(torch.float16).float().reshape(rows, groups)
        zero = parts.extra.reshape(rows, groups).float()
        scale, zero = (v.repeat_interleave(group, 1)[:, :cols] for v in (scale, zero))
        return (codes.float() - zero) * scale

    @pytest.mark.parametrize("shape", [(16, 256), (9, 100), (3, 129), (5, 7)], ids=str)
    @pytest.mark.parametrize(("name", "group"), INT4)
    def test_layout(self, name: str, group: int, shape: tuple[int, int]) -> None:
        x = torch.randn(shape) * torch.rand(shape[0], 1) + 0.3
        parts = encode(x, vramkit.get_format(name))
        assert torch.equal(parts.dense(torch.float32), self.decode(parts, *shape, group))

    @pytest.mark.parametrize("offset", [0.0, 0.5, -3.0, 20.0])
    @pytest.mark.parametrize(("name", "group"), INT4)
    def test_no_worse_than_min_max(self, name: str, group: int, offset: float) -> None:
        """The search begins at the range from min to max, zero included, and improves on it."""
        x = torch.randn(64, 384) * 0.02 + offset * 0.02
        x[::7, ::31] *= 8  # outliers, where clipping pays
        grouped = x.reshape(64, -1, group)
        low = grouped.amin(-1, keepdim=True).clamp(max=0)
        high = grouped.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / 15).to(torch.float16).float()
        zero = (-low / scale).round().clamp(0, 255)
        level = ((grouped / scale).round() + zero).clamp(0, 15)
        plain = ((level - zero) * scale - grouped).double().square().sum(-1)
        ours = encode(x, vramkit.get_format(name)).dense(torch.float32).reshape(grouped.shape)
        error = (ours - grouped).double().square().sum(-1)
        # The search compares float32 sums of `group` squares.
        assert bool((error <= plain * (1 + group * 2.0**-23)).all())
        assert error.sum() < 0.97 * plain.sum()

    def test_better_than_quantos_min_max(self) -> None:
        """quanto's groups have a float32 shift of their own, 8 bytes a group against our 3."""
        x = torch.randn(128, 1024) * 0.02
        grouped = x.reshape(128, -1, 128)
        low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
        scale = (high - low) / 15
        theirs = ((grouped - low) / scale).round().clamp(0, 15) * scale + low
        ours = encode(x, vramkit.get_format("int4")).dense(torch.float32)
        assert (ours - x).norm() < (theirs - grouped).norm()

    def test_constant_and_tiny_groups(self) -> None:
        x = torch.zeros(4, 128)
        x[1] = 0.75
        x[2] = -1e-7
        x[3, 5] = 1000.0
        dense = encode(x, vramkit.get_format("int4")).dense(torch.float32)
        assert torch.equal(dense[0], x[0])
        # One value in a group: code 15 (or 0) holds it as 15 steps of a float16 scale.
        assert (dense[1] - 0.75).abs().max() <= 0.75 * 2.0**-11
        assert (dense[2] - x[2]).abs().max() <= 2.0**-25  # half a step of the least scale
        assert (dense[3] - x[3]).abs().max() <= 1000 * 2.0**-11


def reference_bytes(name: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(codes, scales, extra) by arithmetic of its own."""
    count = math.prod(shape)
    rows = shape[0] if len(shape) > 1 else 1
    cols = math.prod(shape[1:]) if len(shape) > 1 else count
    if name in ("fp16", "bf16"):
        return 2 * count, 0, 0
    if name in ("fp8", "fp8_e5m2", "int8"):
        return count, 4 * rows, 0
    if name.startswith("int4"):
        groups = rows * -(-cols // int(name.partition("_g")[2] or 128))
        return rows * -(-cols // 2), 2 * groups, groups
    blocks = -(-count // 64)
    if name == "nf4_dq":
        return -(-count // 2), blocks, 4 * (-(-blocks // 256) + 1)
    return -(-count // 2), 4 * blocks, 0


@pytest.mark.parametrize("name", BUILTIN)
@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(1, 9))
def test_exact_bytes(name: str, dims: list[int], wide: int) -> None:
    shape = (*dims[:-1], dims[-1] * wide)
    fmt = vramkit.get_format(name)
    size = fmt.bytes(shape)
    assert (size.codes, size.scales, size.extra) == reference_bytes(name, shape)
    assert size.total == size.codes + size.scales + size.extra
    parts = encode(torch.randn(shape), fmt)
    real = [p.numel() if p is not None else 0 for p in (parts.codes, parts.scales, parts.extra)]
    assert real == [size.codes, size.scales, size.extra]
    assert parts.nbytes == size.total
    assert parts.dense(torch.float32).shape == shape


def test_documented_bits_per_weight() -> None:
    bits = {n: vramkit.get_format(n).bits_per_weight((4096, 4096)) for n in BUILTIN}
    assert bits["nf4"] == bits["fp4"] == 4.5
    assert bits["int4"] == 4 + 24 * 32 / 4096
    assert bits["nf4_dq"] == pytest.approx(4 + 8 / 64 + 32 / 64 / 256, abs=1e-5)
    assert bits["int8"] == 8 + 32 / 4096


def test_negative_and_huge_shapes() -> None:
    with pytest.raises(ValueError, match="negative"):
        vramkit.get_format("nf4").bytes((4, -1))
    with pytest.raises(ValueError, match="63 bits"):
        vramkit.get_format("nf4").bytes((1 << 40, 1 << 40))


@pytest.mark.parametrize("isa", _core.available_isas())
def test_every_instruction_set_writes_the_same_bits(isa: str, run_python: RunPython) -> None:
    script = """
import hashlib, torch, vramkit
from vramkit._operators import encode
from vramkit import _core
torch.manual_seed(7)
digest = hashlib.sha256()
for name in vramkit.format_names():
    for shape in ((64, 128), (33, 100), (5, 63)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            parts = encode(torch.randn(shape).to(dtype), vramkit.get_format(name))
            for part in (parts.codes, parts.scales, parts.extra):
                digest.update(b"" if part is None else part.numpy().tobytes())
            for out in (torch.float32, torch.bfloat16, torch.float16):
                digest.update(parts.dense(out).view(torch.uint8).numpy().tobytes())
print(_core.active_isa(), digest.hexdigest())
"""
    scalar = run_python(script, env={"VRAMKIT_ISA": "scalar"}).stdout.split()
    chosen = run_python(script, env={"VRAMKIT_ISA": isa}).stdout.split()
    assert scalar[0] == "scalar"
    assert chosen == [isa, scalar[1]]


def test_formats_are_data() -> None:
    fmt = vramkit.get_format("nf4")
    assert (fmt.family, fmt.bits, fmt.block, fmt.nested) == ("codebook", 4, 64, False)
    assert vramkit.get_format(fmt) is fmt
    assert vramkit.get_format(vramkit.PrecisionMode.NF4) is fmt
    assert pickle.loads(pickle.dumps(fmt)) is fmt
    assert "4.50 bits" in repr(fmt)
    with pytest.raises(ValueError, match="nf4_dq"):
        vramkit.get_format("nf5")


class TestRegisterFormat:
    def test_16_values_in_any_order(self) -> None:
        values = torch.linspace(-2, 2, 16)[torch.randperm(16)]
        fmt = vramkit.register_format("shuffled", values, block=32)
        assert fmt.native.table == (values.double() / 2).float().tolist()
        x = torch.randn(24, 96)
        parts = encode(x, fmt)
        absmax, y = scaled(x.reshape(-1), 32)
        table = torch.tensor(fmt.native.table)
        assert torch.equal(f32(parts.scales), absmax)
        nearest = (table[None].double() - y[:, None].double()).abs().amin(-1)
        chosen = (table[nibbles(parts.codes, x.numel())].double() - y.double()).abs()
        assert bool((chosen <= nearest + 2.0**-24).all())  # midpoints are float32
        decoded = table[nibbles(parts.codes, x.numel())] * absmax.repeat_interleave(32)
        assert torch.equal(parts.dense(torch.float32).reshape(-1), decoded)

    def test_256_values(self) -> None:
        values = torch.randn(256)
        fmt = vramkit.register_format("normal256", values, block=128)
        assert (fmt.bits, fmt.block) == (8, 128)
        x = torch.randn(16, 256)
        parts = encode(x, fmt)
        absmax, y = scaled(x.reshape(-1), 128)
        table = torch.tensor(fmt.native.table).double()
        nearest = (table - y[:, None].double()).abs().amin(-1)
        chosen = (table[parts.codes.reshape(-1).long()] - y.double()).abs()
        assert bool((chosen <= nearest + 2.0**-24).all())  # midpoints are float32
        nested = vramkit.register_format("nested256", values, block=128, nested=True)
        small = encode(x, nested)
        assert torch.equal(small.codes, parts.codes)
        assert (parts.nbytes, small.nbytes) == (4096 + 4 * 32, 4096 + 32 + 8)
        # The dynamic map's steps are at most 0.9 / 64 wide near its largest value.
        spread = (absmax - absmax.mean()).abs().max()
        miss = (small.dense(torch.float32) - parts.dense(torch.float32)).abs().max()
        assert miss <= spread * 0.9 / 64 / 2 * 1.001

    def test_a_tie_takes_the_lower_code(self) -> None:
        fmt = vramkit.register_format("ties", [-1.0, 0.0, 0.5, 1.0] + [1.0] * 12, block=4)
        x = torch.tensor([[1.0, 0.25, 0.75, -0.5]])
        assert encode(x, fmt).dense(torch.float32).tolist() == [[1.0, 0.0, 0.5, -1.0]]

    def test_in_every_step(self, tmp_path: object, run_python: RunPython) -> None:
        table = torch.linspace(-1, 1, 16)
        fmt = vramkit.register_format("uniform16", table, block=32)
        model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64)).eval()
        x = torch.randn(5, 64)
        size = sum(fmt.bytes(layer.weight.shape).total for layer in model) + 4 * (48 + 64)
        assert vramkit.estimate(model, "uniform16", x).weights_bytes == size
        made = vramkit.plan(model, f"{size} B", formats=["uniform16"])
        assert [e.format for e in made.entries] == ["uniform16", "uniform16"]
        report = vramkit.convert(model, fmt)
        assert report.bytes == size
        vramkit.save(model, f"{tmp_path}/a")
        expected = model(x)
        loaded = vramkit.load(
            f"{tmp_path}/a", factory=lambda: nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64))
        )
        assert torch.equal(loaded(x), expected)
        torch.save(x, f"{tmp_path}/x.pt")
        # A process that never heard of the format finds its table in the checkpoint.
        script = """
import sys, torch, vramkit
from torch import nn
model = vramkit.load(sys.argv[1] + "/a",
                     factory=lambda: nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64)))
torch.save(model(torch.load(sys.argv[1] + "/x.pt")), sys.argv[1] + "/y.pt")
assert "uniform16" in vramkit.format_names()
"""
        run_python(script, tmp_path)
        assert torch.equal(torch.load(f"{tmp_path}/y.pt"), expected)

    @pytest.mark.parametrize(
        ("table", "block", "text"),
        [
            ([0.0] * 15 + [1.0] * 2, 64, "16 or 256"),
            ([0.0] * 16, 64, "not all zero"),
            ([math.nan] + [1.0] * 15, 64, "finite"),
            ([math.inf] + [1.0] * 15, 64, "finite"),
            (list(range(16)), 0, "positive even"),
            (list(range(16)), 33, "positive even"),
        ],
    )
    def test_errors(self, table: list[float], block: int, text: str) -> None:
        with pytest.raises(ValueError, match=text):
            vramkit.register_format("bad", table, block=block)
        assert "bad" not in vramkit.format_names()

    @pytest.mark.parametrize("name", ["nf4", " FP32 ", "int8_dynamic", "", "int4_g32"])
    def test_names_that_are_taken(self, name: str) -> None:
        with pytest.raises(ValueError, match="built-in"):
            vramkit.register_format(name, list(range(16)))

    def test_registering_twice(self) -> None:
        first = vramkit.register_format("twice", list(range(16)))
        assert vramkit.register_format("Twice", list(range(16))) is first
        with pytest.raises(ValueError, match="different format"):
            vramkit.register_format("twice", list(range(16)), block=32)

    def test_pickled_layer_brings_its_format(self, tmp_path: object, run_python: RunPython) -> None:
        fmt = vramkit.register_format("carried", torch.linspace(-1, 1, 16))
        layer = nn.Sequential(nn.Linear(64, 8, bias=False))
        vramkit.convert(layer, fmt)
        torch.save(layer, f"{tmp_path}/layer.pt")
        script = """
import sys, torch, vramkit
layer = torch.load(sys.argv[1] + "/layer.pt", weights_only=False)
torch.save(layer(torch.ones(1, 64)), sys.argv[1] + "/y.pt")
"""
        run_python(script, tmp_path)
        assert torch.equal(torch.load(f"{tmp_path}/y.pt"), layer(torch.ones(1, 64)))


@pytest.mark.parametrize("text", ["NF4", " nf4 ", vramkit.PrecisionMode.NF4])
def test_precision_parse(text: str) -> None:
    assert vramkit.PrecisionMode.parse(text) is vramkit.PrecisionMode.NF4


@pytest.mark.parametrize("text", ["", "nf", "float32", 4, None])
def test_precision_parse_refuses(text: object) -> None:
    with pytest.raises(ValueError, match=r"fp32, fp16, bf16, fp8, .*nf4_dq, fp4"):
        vramkit.PrecisionMode.parse(text)  # type: ignore[arg-type]


def test_precision_names() -> None:
    assert [m.value for m in vramkit.PrecisionMode] == (
        [
            "fp32",
            "fp16",
            "bf16",
            "fp8",
            "fp8_e5m2",
            "int8",
            "int8_dynamic",
            "llm_int8",
            "int4",
            "nf4",
            "nf4_dq",
            "fp4",
        ]
    )
    assert vramkit.PrecisionMode.FP32.format_name is None
    assert str(vramkit.PrecisionMode.INT8) == vramkit.PrecisionMode.INT8 == "int8"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6 GB", 6 * 10**9),
        ("6GiB", 6 << 30),
        ("512 MB", 512 * 10**6),
        ("1000 B", 1000),
        ("0.5 kib", 512),
        (6, 6 << 30),
        (0.25, 1 << 28),
        (0, 0),
    ],
)
def test_sizes(text: float | str, size: int) -> None:
    assert vramkit.parse_size(text) == size


@pytest.mark.parametrize("text", ["6", "GB", "-1 GB", "6 Gb it", -1, math.nan, math.inf, "1e3 B"])
def test_sizes_refused(text: float | str) -> None:
    with pytest.raises(ValueError, match="size"):
        vramkit.parse_size(text)


@pytest.mark.parametrize("text", [None, True, [1]])
def test_sizes_of_a_wrong_type(text: object) -> None:
    with pytest.raises(TypeError, match="6 GB"):
        vramkit.parse_size(text)  # type: ignore[arg-type]


def test_large_sizes_are_exact() -> None:
    assert vramkit.parse_size(f"{(1 << 53) - 1} B") == (1 << 53) - 1
    assert vramkit.parse_size(f"{(1 << 60) + 1} B") == (1 << 60) + 1
