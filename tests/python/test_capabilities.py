"""The table from compute capabilities to native formats, and who asks it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vramkit import capabilities
from vramkit.capabilities import CUDA_CAPABILITIES, by_capability, explain, multiplies, of_cpu
from vramkit.targets import parse_target

# Facts of the programming guide, each by the capabilities that have it (None: to the end).
SINCE = {
    "fp16": ((7, 0), None),
    "int8": ((7, 5), None),
    "bf16": ((8, 0), None),
    "tf32": ((8, 0), None),
    "fp8": ((8, 9), None),
    "fp8_e4m3": ((8, 9), None),
    "fp8_e5m2": ((8, 9), None),
    "fp4": ((10, 0), None),
    "fp6": ((10, 0), None),
    "int4": ((7, 5), (9, 0)),
}
REAL = [
    (5, 0), (6, 1), (7, 0), (7, 2), (7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0),
    (10, 3), (11, 0), (12, 0), (12, 1),
]  # fmt: skip


@pytest.mark.parametrize("capability", REAL)
def test_formats_by_capability(capability: tuple[int, int]) -> None:
    row = by_capability(capability)
    for fmt, (first, end) in SINCE.items():
        assert row.native(fmt) == (first <= capability and (end is None or capability < end)), fmt
    assert row.native("fp64") == (capability in {(8, 0), (9, 0), (10, 0), (10, 3)})
    assert not row.native("nf4")
    assert row.async_copy == (capability >= (8, 0))
    assert row.tma == (capability >= (9, 0))
    assert row.flash_attention == (capability >= (8, 0))
    assert row.kernels == (capability >= (7, 5))
    if row.tensor_cores:
        assert all(name in explain(capability) for name in row.tensor_cores)


def test_rows_are_in_order_and_the_ends_are_said() -> None:
    assert [row.least for row in CUDA_CAPABILITIES] == sorted(
        (row.least for row in CUDA_CAPABILITIES), reverse=True
    )
    assert by_capability((13, 7)) is CUDA_CAPABILITIES[0]
    assert "as far as is known" in explain((13, 7))
    assert not capabilities.describe((13, 7))["known"]
    assert explain((6, 1)) == "capability 6.1 has no tensor cores"
    with pytest.raises(ValueError, match=r"below capability 5\.0, and this is 3\.5"):
        by_capability((3, 5))


def test_targets_use_the_table() -> None:
    target = parse_target("cuda:8.9")
    assert (target.flash, target.efficient) == (True, True)
    assert any(explain((8, 9)) in note for note in target.notes())
    assert parse_target("cuda:9.0").blas_bytes == 32 << 20
    assert parse_target("cuda:7.5").flash is False
    with pytest.raises(ValueError, match=r"target 'cuda:3\.5': torch runs on no"):
        parse_target("cuda:3.5")


def test_devices_are_asked_by_capability_never_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: pytest.fail("a name was read"))
    here = torch.device("cuda", 0)
    for capability, fp8 in (((8, 6), False), ((8, 9), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None, c=capability: c)
        assert multiplies(here, "fp8") is fp8
        assert multiplies(here, "bf16")
    assert not multiplies(torch.device("cpu"), "bf16")
    monkeypatch.setattr(torch.version, "cuda", None)  # a build for ROCm, whose numbers differ
    assert not multiplies(here, "bf16")


SAPPHIRE = (
    "processor\t: 0\nflags\t\t: fpu avx2 fma f16c avx512f avx512bw avx512vl avx512_vnni "
    "avx512_bf16 avx512_fp16 amx_bf16 amx_tile amx_int8\nprocessor\t: 1\n"
)
HASWELL = "processor\t: 0\nflags\t\t: fpu fma f16c avx avx2\n"
ALDER_LAKE = "flags\t\t: fpu avx2 fma f16c avx_vnni\n"


@pytest.mark.parametrize(
    ("text", "native"),
    [
        (SAPPHIRE, ("fp32", "bf16", "fp16", "int8")),
        (HASWELL, ("fp32",)),
        (ALDER_LAKE, ("fp32", "int8")),
        ("CPU implementer : 0x41\n", ("fp32",)),
    ],
)
def test_cpus_by_what_the_system_lists(tmp_path: Path, text: str, native: tuple[str, ...]) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(text, encoding="ascii")
    assert of_cpu(file).native == native


def test_a_cpu_that_nothing_is_known_of(tmp_path: Path) -> None:
    found = of_cpu(tmp_path / "missing")
    assert found.avx2 is None
    assert found.amx_int8 is None
    assert found.native == ("fp32",)


def test_this_cpu_has_what_its_kernels_need() -> None:
    from vramkit import _core

    found, isas = of_cpu(), _core.available_isas()
    if found.avx2 is not None:
        assert found.avx2 or "avx2" not in isas
        assert (found.avx512 and found.vnni and found.avx512_bf16) or "avx512" not in isas


def test_doctor_reports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from vramkit import _native, doctor

    about = SimpleNamespace(name="a card", major=8, minor=9, total_memory=12 << 30)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: about)
    found = doctor.examine(rates=False)
    assert found["cuda_kernels"] is _native.HAS_CUDA_OPERATORS
    card = found["cuda_devices"][0]
    assert card["capability"] == "8.9"
    assert card["architecture"] == "Ada"
    assert "fp8" in card["tensor_cores"]
    assert card["kernels"]
    assert found["cpu"]["native"][0] == "fp32"
