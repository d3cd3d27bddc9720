"""bitsandbytes on vramkit's kernels: its bits, its layers, and its own code back afterwards."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import bitsandbytes as bnb
import bitsandbytes.functional as F
import pytest
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from numerics import INT8_CONSTANT, TINY, UNIT, assert_within, linear_bound
from torch import Tensor, nn
from vramkit.formats import get_format
from vramkit.interop import bitsandbytes as interop

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
BLOCKS = [32, 64, 128, 256, 512, 1024, 2048, 4096]
SHAPES = [(1,), (7,), (64, 64), (33, 65), (5, 96), (3, 4097), (128, 2, 33)]
MAPS = {
    "dynamic": lambda: F.create_dynamic_map(),
    "unsigned": lambda: F.create_dynamic_map(signed=False),
    "linear": lambda: F.create_linear_map(),
    "fp8": lambda: F.create_fp8_map(),
    "short": lambda: F.create_dynamic_map(max_exponent_bits=3, total_bits=6),
}


@pytest.fixture(autouse=True)
def _off() -> Iterator[None]:
    interop.disable()
    yield
    interop.disable()


def weight(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    made = torch.randn(shape).to(dtype)
    if made.numel() > 200:
        made.view(-1)[:128] = 0  # blocks of zeros
    return made


class TestSwitch:
    def test_on_and_off_again(self) -> None:
        assert not interop.enabled()
        assert interop.disable() is False
        own = bnb.nn.modules._convert_weight_packed_for_cpu
        names = interop.enable()
        assert interop.enabled()
        assert interop.enable() == names
        assert {"bitsandbytes::gemm_4bit", "bitsandbytes::dequantize_4bit.out"} <= set(names)
        with pytest.raises(ValueError, match="quant_type must be"):  # ours: its own is a KeyError
            torch.ops.bitsandbytes.quantize_4bit(torch.ones(64), 64, "nf5", torch.uint8)
        assert interop.disable() is True
        assert interop.disable() is False
        assert bnb.nn.modules._convert_weight_packed_for_cpu is own
        with pytest.raises(NotImplementedError):  # it has no CPU code for this one
            torch.ops.bitsandbytes.int8_double_quant(torch.ones(4, 4))

    def test_threads(self) -> None:
        done: list[bool] = []
        x = torch.randn(1000)
        expected = F.quantize_4bit(x)[0]

        def turn() -> None:
            for _ in range(20):
                interop.enable()
                done.append(torch.equal(F.quantize_4bit(x)[0], expected))
                interop.disable()

        threads = [threading.Thread(target=turn) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert done == [True] * 80
        assert not interop.enabled()

    def test_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(ImportError, match=r"pip install 'bitsandbytes>=0\.50'"):
            interop.enable()
        assert not interop.enabled()

    def test_too_old(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(__version__="0.49.2"))
        with pytest.raises(ImportError, match=r"0\.50 or newer, found 0\.49\.2"):
            interop.enable()

    def test_an_unknown_operator_changes_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        known = interop._implementations()
        monkeypatch.setattr(interop, "_names", [])
        monkeypatch.setattr(interop, "_implementations", lambda: {**known, "no_such": print})
        with pytest.raises(RuntimeError, match="no operator 'no_such'"):
            interop.enable()
        assert not interop.enabled()


class TestFourBit:
    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    @pytest.mark.parametrize("block", BLOCKS)
    def test_its_bits(self, block: int, quant_type: str) -> None:
        for dtype in FLOATS:
            for shape in SHAPES:
                for nested in (False, True):
                    x = weight(shape, dtype)
                    made = []
                    for switch in (interop.disable, interop.enable):
                        switch()
                        packed, state = F.quantize_4bit(
                            x, blocksize=block, quant_type=quant_type, compress_statistics=nested
                        )
                        outer = state.state2.absmax if nested else state.absmax
                        made.append((packed, state.absmax, outer))
                    for own, ours in zip(*made, strict=True):
                        assert own.shape == ours.shape
                        assert own.dtype == ours.dtype
                        assert torch.equal(own, ours), (block, quant_type, dtype, shape, nested)

    @pytest.mark.parametrize("storage", FLOATS)
    def test_other_storage_dtypes(self, storage: torch.dtype) -> None:
        x = torch.randn(64, 48)
        own = F.quantize_4bit(x, quant_storage=storage)
        interop.enable()
        ours = F.quantize_4bit(x, quant_storage=storage)
        assert ours[0].dtype == storage
        assert ours[0].shape == own[0].shape
        assert torch.equal(own[0].view(torch.uint8), ours[0].view(torch.uint8))
        assert torch.equal(
            F.dequantize_4bit(*ours), F.dequantize_4bit(ours[0].view(torch.uint8), ours[1])
        )

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    def test_decoded(self, quant_type: str, dtype: torch.dtype) -> None:
        """Against its plain formula: its native code takes wrong scales where rows are no whole
        number of blocks."""
        code = F.get_4bit_type(quant_type, device="cpu")
        for block in BLOCKS:
            for shape in SHAPES:
                packed, state = F.quantize_4bit(
                    weight(shape, dtype), blocksize=block, quant_type=quant_type
                )
                plain = _dequantize_4bit_compute.__wrapped__(
                    packed.reshape(-1), state.absmax, code, block, shape, dtype
                )
                interop.enable()
                arguments = (packed, state.absmax, block, quant_type, shape, dtype)
                ours = torch.ops.bitsandbytes.dequantize_4bit(*arguments)
                assert torch.equal(ours, plain), (block, shape)
                out = torch.empty(shape[::-1], dtype=dtype).permute(*range(len(shape))[::-1])
                torch.ops.bitsandbytes.dequantize_4bit.out(*arguments, out=out)
                assert torch.equal(out, plain)
                interop.disable()

    def test_not_a_number_stays_one(self) -> None:
        x = torch.randn(130)
        x[3], x[129] = float("nan"), float("inf")
        interop.enable()
        back = F.dequantize_4bit(*F.quantize_4bit(x, quant_type="nf4"))
        assert back[:64].isnan().all()
        assert back[64:128].isfinite().all()
        assert not back[128:].isfinite().any()

    def test_bad_arguments(self) -> None:
        interop.enable()
        ops = torch.ops.bitsandbytes
        with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
            ops.quantize_4bit(torch.ones(4, dtype=torch.int32), 64, "nf4", torch.uint8)
        packed, state = F.quantize_4bit(torch.randn(64, 64))
        arguments = (packed, state.absmax, 64, "fp4", [64, 64], torch.float32)
        with pytest.raises(ValueError, match="expected out of shape"):
            ops.dequantize_4bit.out(*arguments, out=torch.empty(4, 4))
        with pytest.raises(ValueError, match="takes inputs"):
            ops.gemm_4bit(torch.ones(2, 63), packed, [64, 64], state.absmax, 64, "fp4")


class TestLayers:
    @pytest.mark.parametrize("nested", [False, True])
    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("rows", [1, 9])
    def test_linear4bit(self, rows: int, dtype: torch.dtype, quant_type: str, nested: bool) -> None:
        interop.enable()
        layer = bnb.nn.Linear4bit(
            128, 96, quant_type=quant_type, compress_statistics=nested, compute_dtype=dtype
        )
        layer.weight.data = torch.randn(96, 128)
        layer = layer.to("cpu").eval()
        assert layer.weight.quant_state is not None
        x = torch.randn(rows, 128).to(dtype)
        with torch.no_grad():
            y = layer(x)
        assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
        dense = F.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        bound = linear_bound(x, dense, layer.bias.data, dtype, weight_rounded=True)
        assert_within(y, x.double() @ dense.double().t() + layer.bias.double(), bound)

    def test_gradients(self) -> None:
        interop.enable()
        layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
        x = torch.randn(5, 64, requires_grad=True)
        layer(x).sum().backward()
        dense = F.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        expected = torch.ones(5, 32) @ dense.float()
        assert x.grad is not None
        assert torch.equal(x.grad, expected)

    def test_layers_that_were_packed_before(self) -> None:
        """Those keep its kernel until unpack, and then run on ours, from the same codes."""
        layer = bnb.nn.Linear4bit(128, 64, quant_type="nf4", compute_dtype=torch.bfloat16)
        layer = layer.to("cpu").eval()
        codes = layer.weight.data.clone()
        absmax = (
            F.dequantize_blockwise(layer.weight.quant_state.absmax, layer.weight.quant_state.state2)
            + layer.weight.quant_state.offset
        )
        x = torch.randn(3, 128, dtype=torch.bfloat16)
        with torch.no_grad():
            before = layer(x)
            if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
                pytest.skip("this processor has no AVX-512 BF16, for which layers are packed")
            interop.enable()
            assert torch.equal(layer(x), before)
            assert interop.unpack(nn.Sequential(layer)) == 1
            assert interop.unpack(layer) == 0
            assert torch.equal(layer.weight.data, codes)
            assert torch.equal(layer.weight.quant_state.absmax, absmax.bfloat16().float())
            y = layer(x)
        dense = F.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        bound = linear_bound(x, dense, layer.bias.data, torch.bfloat16, weight_rounded=True)
        assert_within(y, x.double() @ dense.double().t() + layer.bias.double(), bound)

    def test_state_dict_after_a_forward(self) -> None:
        """Inference leaves the weight as it was, so what is saved is what was loaded."""
        interop.enable()
        layer = bnb.nn.Linear4bit(128, 64, compress_statistics=False).to("cpu").eval()
        before = copy.deepcopy(layer.state_dict())
        with torch.no_grad():
            layer(torch.randn(2, 128, dtype=torch.bfloat16))
        after = layer.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k], after[k]) for k in before if k != "bias")

    @pytest.mark.parametrize("dim", [64, 48])
    def test_embedding4bit(self, dim: int) -> None:
        interop.enable()
        layer = bnb.nn.Embedding4bit(50, dim, quant_type="nf4")
        dense = nn.Parameter(torch.randn(50, dim))
        layer.load_state_dict({"weight": dense})
        layer = layer.to("cpu")
        ids = torch.tensor([[1, 49], [0, 1]])
        packed, state = F.quantize_4bit(dense.data, quant_type="nf4")
        assert torch.equal(layer(ids), F.dequantize_4bit(packed, state)[ids])

    @pytest.mark.parametrize("threshold", [0.0, 6.0])
    @pytest.mark.parametrize("rows", [1, 9])
    def test_linear8bit(self, rows: int, threshold: float) -> None:
        torch.manual_seed(1)
        layer = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False, threshold=threshold)
        largest = float(layer.weight.abs().max())
        layer = layer.to("cpu").eval()
        x = torch.randn(rows, 64)
        x[0, 5] = 20.0
        with torch.no_grad():
            own = layer(x)
            interop.enable()
            ours = layer(x)
        # The same codes and products, in float32 to a few roundings. What the constant scales is
        # the output without the bias and without the outlier's own product.
        outlier = 20.0 * largest if threshold else 0.0
        bound = INT8_CONSTANT * ((own - layer.bias).abs() + outlier)
        assert_within(ours, own, bound + 16 * UNIT[torch.float32] * float(own.abs().max()))

    def test_optimizer_states(self) -> None:
        ends = []
        for switch in (interop.disable, interop.enable):
            switch()
            torch.manual_seed(0)
            parameter = nn.Parameter(torch.randn(64, 80))
            optimizer = bnb.optim.Adam8bit([parameter], lr=1e-2, min_8bit_size=1)
            for _ in range(5):
                parameter.grad = torch.randn(64, 80)
                optimizer.step()
            state = optimizer.state[parameter]
            ends.append([parameter.data, state["state1"], state["state2"], state["absmax1"]])
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))

    def test_compiled(self) -> None:
        interop.enable()
        layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32)
        layer = layer.to("cpu")
        x = torch.randn(3, 64)
        with torch.no_grad():
            compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("dtype", FLOATS)
def test_offsets_of_other_dtypes(dtype: torch.dtype) -> None:
    """Checkpoints hold the offset of nested scales in the model's dtype."""
    packed, state = F.quantize_4bit(torch.randn(64, 64), compress_statistics=True)
    offset = state.offset.to(dtype)
    x = torch.randn(2, 64)
    interop.enable()
    y = torch.ops.bitsandbytes.gemm_4bit(
        x, packed, [64, 64], state.state2.absmax, 64, "fp4", None, state.absmax,
        state.state2.code, offset,
    )  # fmt: skip
    state.offset = offset.float()
    dense = F.dequantize_4bit(packed, state)
    bound = linear_bound(x, dense, None, torch.float32)
    assert_within(y, x.double() @ dense.double().t(), bound)


class TestGemv:
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_against_float64(self, dtype: torch.dtype) -> None:
        interop.enable()
        packed, state = F.quantize_4bit(torch.randn(70, 128), quant_type="fp4")
        x = torch.randn(1, 128).to(dtype)
        out = torch.empty(1, 70, dtype=dtype)
        F.gemv_4bit(x, packed.t(), state=state, out=out)
        assert torch.equal(out, F.gemv_4bit(x, packed.t(), state=state))
        dense = F.dequantize_4bit(packed, state).float()
        bound = linear_bound(x, dense, None, dtype, weight_rounded=True)
        assert_within(out, x.double() @ dense.double().t(), bound)


class TestBlockwise:
    @pytest.mark.parametrize("name", list(MAPS))
    @pytest.mark.parametrize("block", [1, 7, 64, 256, 4096])
    def test_its_bits(self, name: str, block: int) -> None:
        code = MAPS[name]().float()
        for dtype in FLOATS:
            x = weight((20011,), dtype)
            own, state = F.quantize_blockwise(x, code=code, blocksize=block)
            arguments = (own, state.absmax, code, block)
            decoded = {
                d: torch.ops.bitsandbytes.dequantize_blockwise(*arguments, d) for d in FLOATS
            }
            interop.enable()
            ours, state2 = F.quantize_blockwise(x, code=code, blocksize=block)
            assert torch.equal(own, ours)
            assert torch.equal(state.absmax, state2.absmax)
            for to, expected in decoded.items():
                got = torch.ops.bitsandbytes.dequantize_blockwise(*arguments, to)
                assert torch.equal(got, expected)
                out = torch.empty(x.shape, dtype=to)
                torch.ops.bitsandbytes.dequantize_blockwise.out(*arguments, to, out=out)
                assert torch.equal(out, expected)
            interop.disable()

    def test_every_point_of_its_grid(self) -> None:
        """Values on and beside each of the 65,536 points that its quantizer rounds to."""
        points = torch.linspace(-1, 1, 65536)
        edges = (points[:-1] + points[1:]) / 2
        up, down = torch.tensor(2.0), torch.tensor(-2.0)
        x = torch.cat([points, edges, torch.nextafter(edges, up), torch.nextafter(edges, down)])
        code = F.create_dynamic_map().float()
        own = F.quantize_blockwise(x, code=code, blocksize=1 << 20)[0]
        interop.enable()
        assert torch.equal(F.quantize_blockwise(x, code=code, blocksize=1 << 20)[0], own)

    def test_a_table_beyond_one(self) -> None:
        code = torch.linspace(-3, 5, 256)
        codes = torch.randint(0, 256, (1000,), dtype=torch.uint8)
        absmax = torch.rand(16)
        interop.enable()
        got = torch.ops.bitsandbytes.dequantize_blockwise(codes, absmax, code, 64, torch.float32)
        expected = code[codes.long()] * absmax.repeat_interleave(64)[:1000]
        assert torch.equal(got, expected)

    def test_empty_and_wrong(self) -> None:
        interop.enable()
        code = F.create_dynamic_map().float()
        codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(torch.empty(0), code, 64)
        assert codes.shape == (0,)
        assert absmax.shape == (0,)
        with pytest.raises(ValueError, match="256 values"):
            torch.ops.bitsandbytes.quantize_blockwise(torch.ones(8), code[:16], 64)
        with pytest.raises(ValueError, match="must be uint8"):
            torch.ops.bitsandbytes.dequantize_blockwise(
                torch.ones(8), absmax, code, 64, torch.float32
            )


class TestInt8:
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("threshold", [0.0, 2.5, 100.0])
    @pytest.mark.parametrize("shape", [(1, 33), (7, 64), (65, 127)])
    def test_codes_by_row(
        self, shape: tuple[int, int], threshold: float, dtype: torch.dtype
    ) -> None:
        x = torch.randn(shape).to(dtype)
        x[-1] = 0
        kept = x.clone()
        own = F.int8_vectorwise_quant(x.clone(), threshold)
        interop.enable()
        ours = F.int8_vectorwise_quant(x, threshold)
        assert torch.equal(x, kept)
        for a, b in zip(own, ours, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)

    def test_double(self) -> None:
        x = torch.randn(37, 65, dtype=torch.float16)
        x[3, 4] = 8
        interop.enable()
        rows, cols, row_stats, col_stats, outliers = F.int8_double_quant(x, threshold=6.0)
        assert outliers.tolist() == [4]
        calm = x.clone()
        calm[3, 4] = 0
        assert torch.equal(row_stats, calm.abs().amax(1).float())
        assert torch.equal(col_stats, calm.abs().amax(0).float())
        by_row = torch.round(calm * (127 / row_stats[:, None])).to(torch.int8)
        by_row[:, 4] = 0
        assert torch.equal(rows, by_row)
        assert torch.equal(cols, torch.round(calm * (127 / col_stats)).to(torch.int8))

    @pytest.mark.parametrize("shape", [(1, 5, 3), (3, 64, 32), (17, 4096, 33)])
    def test_products(self, shape: tuple[int, int, int]) -> None:
        m, k, n = shape
        a, b = (torch.randint(-127, 128, (rows, k), dtype=torch.int8) for rows in (m, n))
        exact = a.long() @ b.long().t()
        interop.enable()
        product = F.int8_linear_matmul(a, b)
        assert product.dtype == torch.int32
        assert torch.equal(product.long(), exact)
        out = torch.empty(m, n, dtype=torch.int32)
        F.int8_linear_matmul(a, b, out=out)
        assert torch.equal(out, product)
        assert torch.equal(F.int8_linear_matmul(a[None], b), product[None])
        rows, cols, bias = torch.rand(m), torch.rand(n), torch.randn(n)
        scaled = torch.ops.bitsandbytes.int8_scaled_mm(a, b, rows, cols, bias, torch.float32)
        real = exact.double() * rows[:, None].double() * cols.double() / 127**2
        # The cast of the integer, two scales, two products and a sum, each rounded once.
        roundings = 6 * UNIT[torch.float32]
        bound = roundings * (real.abs() + bias.double().abs()) * 1.001 + TINY[torch.float32]
        assert_within(scaled, real + bias.double(), bound)

    def test_decoded(self) -> None:
        codes = torch.randint(-127, 128, (9, 33), dtype=torch.int8)
        stats = torch.rand(9)
        interop.enable()
        got = F.int8_vectorwise_dequant(codes, stats)
        real = codes.double() * stats[:, None].double() / 127
        assert_within(got, real, 4 * UNIT[torch.float32] * real.abs() + TINY[torch.float32])


def test_its_tables_are_ours() -> None:
    """The fused product reads codes through vramkit's tables."""
    for name in ("nf4", "fp4"):
        table = get_format(name).table_on(torch.device("cpu"))
        assert table is not None
        assert torch.equal(table, F.get_4bit_type(name, device="cpu"))
