"""Loading Qwen-Image by `ModelConfig`: globs, storage apart from compute dtype, errors, memory."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import vramkit
from qwen_models import image_of, pipeline, transformer, vae
from safetensors.torch import load_file, save_file
from torch import nn
from vramkit.errors import CheckpointError, NonFiniteWeightError
from vramkit.layers import QuantizedLayer
from vramkit.qwen_image import KEEP, ModelConfig, QwenImage, from_pretrained, load_model

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder in bfloat16, the transformer in several shards."""
    root = tmp_path_factory.mktemp("qwen")
    model: Any = transformer().to(torch.bfloat16)
    model.save_pretrained(root / "transformer", max_shard_size="60KB")
    decoder: Any = vae().to(torch.bfloat16)
    decoder.save_pretrained(root / "vae")
    pipeline(model).scheduler.save_pretrained(root / "scheduler")
    assert len(list((root / "transformer").glob("*.safetensors"))) > 2
    return root


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def test_weights_are_stored_in_one_dtype_and_computed_in_another(folder: Path) -> None:
    stored = tensors(folder / "transformer")
    config = ModelConfig(
        folder / "transformer/*.safetensors",
        offload_dtype=torch.float8_e4m3fn,
        computation_dtype=torch.float32,
    )
    model = load_model(config)
    expected = transformer()
    expected.load_state_dict({name: value.float() for name, value in stored.items()})
    vramkit.convert(expected, "fp8", skip=KEEP)
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    layer: Any = model.get_submodule("transformer_blocks.0.attn.to_q")
    assert layer.format_names == "fp8"
    assert layer.compute_dtype is torch.float32
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


def test_norms_and_biases_keep_their_dtype(folder: Path) -> None:
    model = load_model(ModelConfig(folder / "transformer", offload_dtype=torch.float8_e4m3fn))
    stored = tensors(folder / "transformer")
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight", "norm_q.weight", "norm_added_k.weight")):
            assert parameter.dtype is torch.bfloat16
            assert torch.equal(parameter, stored[name])
    kinds = {type(m).__name__ for m in model.modules() if isinstance(m, QuantizedLayer)}
    assert kinds == {"QuantizedLinear"}


def test_each_component_has_its_own_as_the_guide_shows(folder: Path) -> None:
    pipe = from_pretrained(
        [
            ModelConfig("transformer/*.safetensors", torch.float8_e4m3fn, root=folder),
            ModelConfig("vae/*.safetensors", offload_dtype=torch.bfloat16, root=folder),
        ],
        torch_dtype=torch.float32,
    )
    assert isinstance(pipe, QwenImage)
    pipe.pipeline.set_progress_bar_config(disable=True)
    formats = [
        {m.format_names for m in part.modules() if isinstance(m, QuantizedLayer)}
        for part in (pipe.transformer, pipe.vae)
    ]
    assert formats == [{"fp8"}, {"bf16"}]
    assert image_of(pipe).isfinite().all()
    again = from_pretrained(
        [
            ModelConfig(folder / "transformer", "nf4", modulation="int8"),
            ModelConfig(folder / "vae", component="vae"),
        ],
        torch_dtype=torch.bfloat16,
        vram_limit="1 GB",
    )
    found = {m.format_names for m in again.transformer.modules() if isinstance(m, QuantizedLayer)}
    assert found == {"nf4", "int8"}
    assert again.pipeline.vramkit_management.limit_bytes == 10**9
    again.disable_vram_management()


def test_what_is_wrong_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file matches"):
        load_model(ModelConfig("transformer/*.safetensors", root=tmp_path))
    with pytest.raises(ValueError, match=r"cannot be stored in torch\.int64"):
        ModelConfig("x", offload_dtype=torch.int64)
    with pytest.raises(ValueError, match="the formats are"):
        ModelConfig("x", offload_dtype="int3")
    with pytest.raises(ValueError, match="computation_dtype is"):
        ModelConfig("x", computation_dtype=torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match="several folders"):
        load_model(ModelConfig("*/*.safetensors", root=folder))
    one = sorted((folder / "transformer").glob("*.safetensors"))[0]
    with pytest.raises(CheckpointError, match="lacks"):
        load_model(ModelConfig(one))
    with pytest.raises(CheckpointError, match="name one file, or all"):
        load_model(ModelConfig(folder / "transformer/*0000[12]*.safetensors"))
    with pytest.raises(ValueError, match="no config is of the vae"):
        from_pretrained([ModelConfig(folder / "transformer")])
    with pytest.raises(ValueError, match="two configs"):
        from_pretrained([ModelConfig(folder / "vae")] * 2)
    with pytest.raises(ValueError, match="no component"):
        from_pretrained([ModelConfig(folder / "vae", component="unet")])
    save_file({"weight": torch.full((8, 8), float("nan"))}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(ModelConfig(tmp_path / "a.safetensors"))
    asked = ModelConfig(
        tmp_path / "a.safetensors", "int8", factory=lambda: nn.Linear(8, 8, bias=False)
    )
    with pytest.raises(NonFiniteWeightError):
        load_model(asked)
    (tmp_path / "b.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="pickled"):
        load_model(ModelConfig(tmp_path / "b.bin"))


_PROGRAM = """
import resource, sys
sys.path.insert(0, {tests!r})
import torch, vramkit
torch.set_num_threads(1)
import diffusers
from diffusers import QwenImageTransformer2DModel
from vramkit.qwen_image import ModelConfig, load_model
from vramkit.qwen_image.parts import bytes_of

def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10

open("/proc/self/clear_refs", "w").write("5")
before = peak()
config = ModelConfig({path!r}, offload_dtype=torch.float8_e4m3fn, computation_dtype=torch.bfloat16)
model = load_model(config)
print(peak() - before, bytes_of(model))
"""


def test_memory_of_loading_is_the_result_s_and_two_tensors(tmp_path: Path) -> None:
    model: Any = transformer(3, heads=16, head_dim=64, text=64).to(torch.bfloat16)
    total = sum(p.nbytes for p in model.parameters())
    largest = max(p.nbytes for p in model.parameters())
    model.save_pretrained(tmp_path / "transformer")
    del model
    program = _PROGRAM.format(tests=str(Path(__file__).parent), path=str(tmp_path / "transformer"))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    risen, steady = (int(word) for word in done.stdout.split()[-2:])
    assert steady < 0.7 * total
    assert risen <= steady + 2 * largest + 100_000_000
    assert risen <= total + 2 * largest  # as much again as the files would be seen
