"""What users and disks get wrong: a specific error, nothing half-written, the model unchanged."""

from __future__ import annotations

import copy
import errno
import json
import os
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import vramkit
from conftest import RunPython
from torch import nn
from vramkit import BudgetError, CheckpointError, NonFiniteWeightError, QuantizedLayer


def build() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(40, 64), nn.Linear(64, 96), nn.Linear(96, 32)).eval()


class Snapshot:
    """Everything about a model that must be the same after an error."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.classes = [type(m) for m in model.modules()]
        self.parameters = {n: (id(p), p.detach().clone()) for n, p in model.named_parameters()}
        self.attributes = [set(m.__dict__) for m in model.modules()]

    def check(self) -> None:
        assert [type(m) for m in self.model.modules()] == self.classes
        assert [set(m.__dict__) for m in self.model.modules()] == self.attributes
        now = dict(self.model.named_parameters())
        assert list(now) == list(self.parameters)
        for name, (identity, value) in self.parameters.items():
            assert id(now[name]) == identity
            assert torch.equal(now[name].nan_to_num(7.0), value.nan_to_num(7.0))


def stop_after(steps: int, error: type[BaseException] = KeyboardInterrupt) -> Callable[..., None]:
    count = 0

    def progress(done: int, total: int, name: str) -> None:
        nonlocal count
        count += 1
        if count == steps:
            raise error

    return progress


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "in.safetensors"
    safetensors.torch.save_file(build().state_dict(), path)
    return path


class TestWeights:
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("name", ["nf4", "int8", "fp8", "int4", "bf16", "fp16", "nf4_dq"])
    def test_nan_and_infinity(self, name: str, bad: float) -> None:
        model = build()
        with torch.no_grad():
            model[2].weight[31, 95] = bad  # the last one: all others are encoded before
        before = Snapshot(model)
        with pytest.raises(NonFiniteWeightError, match=r"'2' holds NaN or infinity.*skip="):
            vramkit.convert(model, name)
        before.check()
        with pytest.raises(NonFiniteWeightError, match="'2'"):
            vramkit.plan(model, "1 GB")
        with pytest.raises(NonFiniteWeightError, match="'2'"):
            vramkit.fit(model, "20 KB")
        before.check()
        report = vramkit.convert(model, name, skip=["2"])
        assert len(report.layers) == 2

    @pytest.mark.parametrize(("name", "value"), [("fp16", 7e4), ("int4", 2e6)])
    def test_overflow(self, name: str, value: float) -> None:
        model = build()
        with torch.no_grad():
            model[1].weight[0, 0] = value
        before = Snapshot(model)
        with pytest.raises(NonFiniteWeightError, match=f"'1' reaches .*more than {name} holds"):
            vramkit.convert(model, name)
        before.check()
        vramkit.convert(model, "bf16")

    def test_in_a_checkpoint(self, checkpoint: Path, tmp_path: Path) -> None:
        state = safetensors.torch.load_file(checkpoint)
        state["1.weight"][5, 5] = torch.nan
        safetensors.torch.save_file(state, checkpoint)
        with pytest.raises(NonFiniteWeightError, match="'1'"):
            vramkit.load(checkpoint, precision="nf4", factory=build)
        with pytest.raises(NonFiniteWeightError, match="'1'"):
            vramkit.convert_checkpoint(checkpoint, tmp_path / "out", "nf4", factory=build)
        assert leftovers(tmp_path / "out") == []


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*")) if folder.exists() else []


@pytest.mark.parametrize("text", ["nf5", "", "float8", "int 8", "q4_k_m"])
class TestUnknownPrecision:
    def test_convert(self, text: str) -> None:
        model = build()
        before = Snapshot(model)
        with pytest.raises(ValueError, match="nf4_dq"):
            vramkit.convert(model, text)
        before.check()

    def test_elsewhere(self, text: str, checkpoint: Path, tmp_path: Path) -> None:
        for attempt in (
            lambda: vramkit.estimate(build(), text),
            lambda: vramkit.plan(build(), "1 GB", formats=[text]),
            lambda: vramkit.load(checkpoint, precision=text, factory=build),
            lambda: vramkit.convert_checkpoint(checkpoint, tmp_path / "o", text, factory=build),
            lambda: vramkit.get_format(text),
        ):
            with pytest.raises(ValueError, match="nf4_dq"):
                attempt()
        assert leftovers(tmp_path / "o") == []


@pytest.mark.parametrize("bad", [4, None, 1.5, b"nf4", ["nf4"], nn.Linear])
def test_precision_of_a_wrong_type(bad: Any) -> None:
    model = build()
    before = Snapshot(model)
    with pytest.raises(TypeError, match="a precision is a name"):
        vramkit.convert(model, bad)
    before.check()


def test_a_limit_that_nothing_meets(checkpoint: Path) -> None:
    model = build()
    before = Snapshot(model)
    with pytest.raises(BudgetError) as caught:
        vramkit.fit(model, "1 KB")
    before.check()
    needed = caught.value.needed_bytes
    with pytest.raises(BudgetError) as loading:
        vramkit.load(checkpoint, vram_limit="1 KB", factory=build)
    assert loading.value.needed_bytes == needed
    with pytest.raises(BudgetError):
        vramkit.fit(model, f"{needed - 1} B")
    before.check()
    fitted = vramkit.fit(model, f"{needed} B")
    assert vramkit.estimate(fitted).weights_bytes == needed
    loaded = vramkit.load(checkpoint, vram_limit=f"{needed} B", factory=build)
    assert vramkit.estimate(loaded).weights_bytes == needed


class TestInterrupted:
    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
    @pytest.mark.parametrize("step", [1, 2, 3])
    def test_convert(self, step: int, error: type[BaseException]) -> None:
        model = build()
        before = Snapshot(model)
        with pytest.raises(error):
            vramkit.convert(model, "nf4", progress=stop_after(step, error))
        before.check()

    @pytest.mark.parametrize("step", [1, 5, 30])
    def test_fit(self, step: int) -> None:
        model = build()
        before = Snapshot(model)
        with pytest.raises(KeyboardInterrupt):
            vramkit.fit(model, "20 KB", progress=stop_after(step))
        before.check()

    @pytest.mark.parametrize("step", [1, 2, 5])
    def test_convert_checkpoint(self, checkpoint: Path, tmp_path: Path, step: int) -> None:
        with pytest.raises(KeyboardInterrupt):
            vramkit.convert_checkpoint(
                checkpoint, tmp_path / "out", "nf4", factory=build, progress=stop_after(step)
            )
        assert leftovers(tmp_path / "out") == []

    @pytest.mark.parametrize("step", [1, 4])
    def test_save_keeps_no_half(self, tmp_path: Path, step: int) -> None:
        model = build()
        vramkit.convert(model, "nf4")
        with pytest.raises(KeyboardInterrupt):
            vramkit.save(model, tmp_path / "a", progress=stop_after(step))
        assert leftovers(tmp_path / "a") == []

    def test_saving_over_a_checkpoint(self, tmp_path: Path) -> None:
        """The old one stays whole, or there is none: never a mixture that loads."""
        first, second = build(), build()
        vramkit.convert(first, "nf4")
        vramkit.convert(second, "int8")
        vramkit.save(first, tmp_path / "a")
        with pytest.raises(KeyboardInterrupt):
            vramkit.save(second, tmp_path / "a", progress=stop_after(2))
        loaded = vramkit.load(tmp_path / "a", factory=build)
        x = torch.arange(5)
        assert torch.equal(loaded(x), first(x))

    def test_load(self, checkpoint: Path) -> None:
        with pytest.raises(KeyboardInterrupt):
            vramkit.load(checkpoint, precision="nf4", factory=build, progress=stop_after(2))
        assert nn.Linear(2, 2).weight.device.type == "cpu"

    def test_a_signal_in_another_process(self, checkpoint: Path, tmp_path: Path) -> None:
        """Ctrl-C while a file is being written."""
        script = """
import signal, sys, time, torch, vramkit
from torch import nn
# A shell starts its background jobs with SIGINT ignored, and their children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
build = lambda: nn.Sequential(nn.Embedding(40, 64), nn.Linear(64, 96), nn.Linear(96, 32))
def progress(done, total, name):
    print("step", flush=True)
    time.sleep(30)
vramkit.convert_checkpoint(sys.argv[1], sys.argv[2], "nf4", factory=build, progress=progress)
"""
        out = tmp_path / "out"
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(checkpoint), str(out)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "step\n"
        assert leftovers(out)  # the temporary is there now
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        assert "KeyboardInterrupt" in stderr
        assert leftovers(out) == []


class TestTied:
    def test_shared_twice(self) -> None:
        model = nn.Sequential(nn.Embedding(40, 64), nn.Linear(64, 40, bias=False))
        model[1].weight = model[0].weight
        report = vramkit.convert(model, "nf4")
        assert len(report.layers) == 1
        assert model[1].codes is model[0].codes

    def test_nan_in_a_tied_weight(self) -> None:
        model = nn.Sequential(nn.Embedding(40, 64), nn.Linear(64, 40, bias=False))
        model[1].weight = model[0].weight
        with torch.no_grad():
            model[1].weight[3, 3] = torch.nan
        before = Snapshot(model)
        with pytest.raises(NonFiniteWeightError, match="'0'"):
            vramkit.convert(model, "nf4")
        before.check()

    def test_skipping_one_of_two_skips_both(self) -> None:
        model = nn.Sequential(nn.Embedding(40, 64), nn.Linear(64, 40, bias=False))
        model[1].weight = model[0].weight
        assert vramkit.convert(model, "nf4", skip=["1"]).layers == []
        assert model[1].weight is model[0].weight


class TestCheckpoints:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="no checkpoint at"):
            vramkit.load(tmp_path / "nowhere", factory=build)
        (tmp_path / "empty").mkdir()
        with pytest.raises(CheckpointError, match="holds no safetensors file"):
            vramkit.load(tmp_path / "empty", factory=build)

    def test_no_config_and_no_factory(self, checkpoint: Path) -> None:
        with pytest.raises(CheckpointError, match=r"config\.json.*factory"):
            vramkit.load(checkpoint.parent)
        with pytest.raises(CheckpointError, match="factory"):
            vramkit.load(checkpoint)

    def test_missing_shard(self, tmp_path: Path) -> None:
        state = build().state_dict()
        safetensors.torch.save_file({"0.weight": state.pop("0.weight")}, tmp_path / "a.safetensors")
        safetensors.torch.save_file(state, tmp_path / "b.safetensors")
        weight_map = {"0.weight": "a.safetensors"} | dict.fromkeys(state, "b.safetensors")
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        vramkit.load(tmp_path, factory=build)
        (tmp_path / "b.safetensors").unlink()
        for attempt in (
            lambda: vramkit.load(tmp_path, factory=build),
            lambda: vramkit.convert_checkpoint(tmp_path, tmp_path / "o", "nf4", factory=build),
        ):
            with pytest.raises(CheckpointError, match=r"b\.safetensors.*missing"):
                attempt()
        assert leftovers(tmp_path / "o") == []

    @pytest.mark.parametrize(
        "index",
        ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"0.weight": "../in.safetensors"}}',
         '{"weight_map": {"0.weight": "/etc/passwd"}}', '{"weight_map": {"0.weight": 3}}'],
    )  # fmt: skip
    def test_bad_index(self, checkpoint: Path, tmp_path: Path, index: str) -> None:
        folder = tmp_path / "folder"
        folder.mkdir()
        (folder / "model.safetensors.index.json").write_text(index)
        with pytest.raises(CheckpointError, match=r"index\.json"):
            vramkit.load(folder, factory=build)

    def test_index_and_shards_disagree(self, checkpoint: Path, tmp_path: Path) -> None:
        folder = tmp_path / "folder"
        folder.mkdir()
        safetensors.torch.save_file(build().state_dict(), folder / "a.safetensors")
        weight_map = {"0.weight": "a.safetensors", "9.weight": "a.safetensors"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=r"9\.weight"):
            vramkit.load(folder, factory=build)

    @pytest.mark.parametrize("keep", [0, 4, 8, 40, 300, -1])
    def test_truncated(self, checkpoint: Path, tmp_path: Path, keep: int) -> None:
        data = checkpoint.read_bytes()
        checkpoint.write_bytes(data[:keep])
        with pytest.raises(CheckpointError, match=r"in\.safetensors"):
            vramkit.load(checkpoint, precision="nf4", factory=build)
        with pytest.raises(CheckpointError, match=r"in\.safetensors"):
            vramkit.convert_checkpoint(checkpoint, tmp_path / "out", "nf4", factory=build)
        assert leftovers(tmp_path / "out") == []

    @pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 1 << 40])
    def test_header_lengths(self, checkpoint: Path, length: int) -> None:
        data = checkpoint.read_bytes()
        checkpoint.write_bytes(struct.pack("<Q", length) + data[8:])
        with pytest.raises(CheckpointError, match="header"):
            vramkit.load(checkpoint, factory=build)

    def test_another_models(self, checkpoint: Path) -> None:
        def other() -> nn.Module:
            return nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 32), nn.Linear(32, 8))

        with pytest.raises(CheckpointError, match=r"lacks '0\.bias'|has shape"):
            vramkit.load(checkpoint, factory=other)
        model = build()
        vramkit.convert(model, "nf4")
        vramkit.save(model, checkpoint.parent / "saved")
        with pytest.raises(CheckpointError, match=r"another model|shape|lacks"):
            vramkit.load(checkpoint.parent / "saved", factory=other)

    def test_wrong_shape(self, checkpoint: Path) -> None:
        def other() -> nn.Module:
            return nn.Sequential(nn.Embedding(41, 64), nn.Linear(64, 96), nn.Linear(96, 32))

        with pytest.raises(CheckpointError, match=r"0\.weight.*\[40, 64\].*\[41, 64\]"):
            vramkit.load(checkpoint, factory=other)
        model = build()
        vramkit.convert(model, "nf4")
        vramkit.save(model, checkpoint.parent / "saved")
        with pytest.raises(CheckpointError, match="40"):
            vramkit.load(checkpoint.parent / "saved", factory=other)

    @pytest.mark.parametrize(
        "change",
        [
            lambda d: d.update(schema="vramkit.checkpoint/9"),
            lambda d: d.pop("schema"),
            lambda d: d.pop("layers"),
            lambda d: d.pop("formats"),
            lambda d: d["layers"]["1"].update(format="int3"),
            lambda d: d["layers"]["1"].update(compute_dtype="float33"),
            lambda d: d["layers"]["1"].update(compute_dtype="nn"),
            lambda d: d["layers"]["1"].update(shape=[96, 65]),
            lambda d: d["layers"]["1"].update(shape="x"),
            lambda d: d["layers"]["1"].update(format="int8"),
            lambda d: d.update(layers=[]),
            lambda d: d["formats"].update(mine={"table": [1.0], "block": 64, "nested": False}),
            lambda d: d["layers"].pop("1"),
            lambda d: d["layers"].update({"7": d["layers"]["1"]}),
            lambda d: d.update(tied={"9": "1"}),
            lambda d: d.update(tied={"1": "9"}),
            lambda d: d.update(tied=3),
            lambda d: d.update(aliases=[1]),
        ],
    )
    def test_bad_manifest(self, tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
        model = build()
        vramkit.convert(model, "nf4")
        vramkit.save(model, tmp_path / "a")
        file = tmp_path / "a" / "vramkit.json"
        data = json.loads(file.read_text())
        change(data)
        file.write_text(json.dumps(data))
        with pytest.raises(CheckpointError):
            vramkit.load(tmp_path / "a", factory=build)

    @pytest.mark.parametrize("text", ["", "[]", "3", "\xff", "null", '{"schema"'])
    def test_manifest_of_another_kind(self, tmp_path: Path, text: str) -> None:
        vramkit.save(build(), tmp_path / "a")
        (tmp_path / "a" / "vramkit.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(CheckpointError, match=r"vramkit\.json"):
            vramkit.load(tmp_path / "a", factory=build)

    def test_parts_of_a_wrong_size(self, tmp_path: Path) -> None:
        model = build()
        vramkit.convert(model, "nf4")
        vramkit.save(model, tmp_path / "a")
        state = safetensors.torch.load_file(tmp_path / "a" / "model.safetensors")
        state["1.codes"] = state["1.codes"][:-1].clone()
        safetensors.torch.save_file(state, tmp_path / "a" / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"1\.codes"):
            vramkit.load(tmp_path / "a", factory=build)

    def test_asking_for_two_things(self, checkpoint: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="not both"):
            vramkit.load(checkpoint, precision="nf4", vram_limit="1 GB", factory=build)
        vramkit.save(build(), tmp_path / "a")
        with pytest.raises(ValueError, match="converted already"):
            vramkit.load(tmp_path / "a", precision="nf4", factory=build)

    def test_onto_itself(self, tmp_path: Path) -> None:
        folder = tmp_path / "in"
        folder.mkdir()
        safetensors.torch.save_file(build().state_dict(), folder / "model.safetensors")
        before = (folder / "model.safetensors").read_bytes()
        with pytest.raises(ValueError, match="source itself"):
            vramkit.convert_checkpoint(folder, folder, "nf4", factory=build)
        with pytest.raises(ValueError, match="source itself"):
            vramkit.convert_checkpoint(folder / "model.safetensors", folder, "nf4", factory=build)
        assert (folder / "model.safetensors").read_bytes() == before


class TestDisk:
    def test_output_is_a_file(self, checkpoint: Path, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("mine")
        with pytest.raises(OSError, match="out"):
            vramkit.convert_checkpoint(checkpoint, tmp_path / "out", "nf4", factory=build)
        with pytest.raises(OSError, match="out"):
            vramkit.save(build(), tmp_path / "out")
        assert (tmp_path / "out").read_text() == "mine"

    def test_unwritable(self) -> None:
        """The kernel's own folder takes no files, from root neither."""
        for attempt in (
            lambda: vramkit.save(build(), "/proc/vramkit-out"),
            lambda: vramkit.save(build(), "/proc"),
        ):
            with pytest.raises(OSError, match="/proc"):
                attempt()

    def test_unwritable_for_a_user(self, checkpoint: Path, tmp_path: Path) -> None:
        """A folder without write permission; root, whom it does not stop, becomes nobody first."""
        (tmp_path / "out").mkdir()
        (tmp_path / "out").chmod(0o555)
        script = """
import os, sys
import torch, vramkit
import vramkit.checkpoint  # while the installation can still be read
from torch import nn
build = lambda: nn.Sequential(nn.Embedding(40, 64), nn.Linear(64, 96), nn.Linear(96, 32))
folder = os.open(sys.argv[1], os.O_RDONLY)
os.fchdir(folder)
if os.geteuid() == 0:
    os.setegid(65534)
    os.seteuid(65534)
for attempt in (lambda: vramkit.save(build(), "."), lambda: vramkit.save(build(), "new")):
    try:
        attempt()
    except PermissionError as error:
        print(error)
    else:
        raise SystemExit("no PermissionError")
"""
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "out")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        (tmp_path / "out").chmod(0o755)
        assert done.returncode == 0, done.stderr
        assert leftovers(tmp_path / "out") == []

    @pytest.mark.parametrize("what", ["save", "convert"])
    def test_no_room(self, what: str, tmp_path: Path, run_python: RunPython) -> None:
        """A limit on the size of files stands for a disk that is full: EFBIG in place of ENOSPC."""
        model = nn.Sequential(nn.Linear(512, 512))
        safetensors.torch.save_file(model.state_dict(), tmp_path / "in.safetensors")
        script = """
import resource, signal, sys
import torch, vramkit, vramkit.checkpoint
from torch import nn
build = lambda: nn.Sequential(nn.Linear(512, 512))
model = build()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    if sys.argv[1] == "save":
        vramkit.save(model, sys.argv[2] + "/out")
    else:
        vramkit.convert_checkpoint(sys.argv[2] + "/in.safetensors", sys.argv[2] + "/out", "nf4",
                                   factory=build)
except OSError as error:
    print(error.errno)
    print(error)
"""
        number, text = run_python(script, what, tmp_path).stdout.splitlines()[:2]
        assert int(number) in (errno.EFBIG, errno.ENOSPC)
        assert "model.safetensors" in text
        assert leftovers(tmp_path / "out") == []

    def test_full_disk(self, tmp_path: Path) -> None:
        """ENOSPC itself, on a small file system in memory, where the system lets us mount one."""
        disk = tmp_path / "disk"
        disk.mkdir()
        script = f"""
set -e
mount -t tmpfs -o size=256k none {disk}
{sys.executable} -c '
import torch, vramkit
from torch import nn
model = nn.Sequential(nn.Linear(512, 512))
try:
    vramkit.save(model, "{disk}/out")
except OSError as error:
    print("errno", error.errno)
    print(error)
'
find {disk} -type f
"""
        done = subprocess.run(
            ["unshare", "--map-root-user", "--mount", "sh", "-c", script],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0 and "errno" not in done.stdout:
            # Not skipped: the same path with the error that a size limit gives.
            assert any(word in done.stderr for word in ("unshare", "mount")), done.stderr
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
            try:
                with pytest.raises(OSError, match=r"model\.safetensors"):
                    vramkit.save(nn.Sequential(nn.Linear(512, 512)), tmp_path / "out")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
                signal.signal(signal.SIGXFSZ, handler)
            assert leftovers(tmp_path / "out") == []
            return
        lines = done.stdout.splitlines()
        assert lines[0] == f"errno {errno.ENOSPC}"
        assert str(512 * 512 * 4)[:4] in "".join(lines[1:]).replace(",", "") or "bytes" in lines[1]
        assert not any(line.startswith(str(disk)) for line in lines[2:])


def test_errors_have_both_natures() -> None:
    """Each is vramkit's own and of the built-in type that callers expect."""
    from vramkit import errors

    for own, builtin in (
        (errors.CheckpointError, ValueError),
        (errors.BudgetError, ValueError),
        (errors.NonFiniteWeightError, ValueError),
        (errors.ReadOnlyWeightError, RuntimeError),
        (errors.StaleHandleError, RuntimeError),
    ):
        assert issubclass(own, builtin)
        assert issubclass(own, errors.VramkitError)
    copied = copy.copy(errors.BudgetError("text", 7))
    assert (str(copied), copied.needed_bytes) == ("text", 7)


def test_a_failed_conversion_can_be_repeated() -> None:
    model = build()
    with pytest.raises(KeyboardInterrupt):
        vramkit.convert(model, "nf4", progress=stop_after(2))
    report = vramkit.convert(model, "nf4")
    assert len(report.layers) == 3
    assert all(isinstance(m, QuantizedLayer) for m in model)


def test_paths_of_every_kind(tmp_path: Path) -> None:
    model = build()
    for path in (str(tmp_path / "a"), tmp_path / "b", os.fspath(tmp_path / "ü ö")):
        vramkit.save(model, path)
        x = torch.arange(3)
        assert torch.equal(vramkit.load(path, factory=build)(x), model(x))
