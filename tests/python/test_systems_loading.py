"""Peak memory of loading each system: its steady bytes, two of its largest tensors, 100 MB.

In a process of its own, on checkpoints large enough that loading the plain model first would show.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import RunPython
from test_memory_bounds import SCRIPT, SLACK

# Of test_memory_bounds: `Peak`, which measures resident memory, pages of mapped files included.
PEAK = SCRIPT.split("size, count =")[0]

WRITE = """
import json, sys
from pathlib import Path
import torch
from torch import nn
sys.path[:0] = sys.argv[3:]
from vramkit import _core
from vramkit.shards import SAFETENSORS_NAMES
from vramkit.heartmula import model as mula_model
from vramkit.heartmula import CodecConfig, HeartCodec, HeartMuLa, HeartMuLaConfig
FLAVORS = mula_model.FLAVORS
FLAVORS["mid"] = mula_model.Flavor(6, 16, 8, 1280, 5120, 512)
MULA = HeartMuLaConfig("mid", "small-decoder-mid", 8000, 1000, 4, 64)
FLAVORS["small-decoder-mid"] = mula_model.Flavor(1, 8, 4, 1280, 2560, 64)
CODEC = CodecConfig(dim=64, codebook_size=512, num_attention_heads=8, in_channels=128,
    out_channels=32, num_layers=6, num_layers_2=1, init_channel=16)
def partformer():
    from benchmarks.system_models import XPartDit
    return XPartDit(512, 9, 384)
FACTORIES = {"mula": lambda: HeartMuLa(MULA), "codec": lambda: HeartCodec(CODEC),
             "partformer": partformer}

def write(what, folder, name):
    # One tensor at a time, of the model's shapes; the values do not matter here.
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in FACTORIES[what]().state_dict().items()}
    dtype = torch.float32 if what == "codec" else torch.bfloat16
    specs = [(k, SAFETENSORS_NAMES[dtype], list(v)) for k, v in shapes.items()]
    Path(folder).mkdir(parents=True, exist_ok=True)
    with _core.SafetensorsWriter(f"{folder}/{name}", specs, {}) as writer:
        for key, shape in shapes.items():
            tensor = (torch.randn(shape) * 0.02 + 0.01).to(dtype)
            writer.write(key, tensor.data_ptr(), tensor.nbytes)
        writer.commit()
    if what != "partformer":
        config = (MULA if what == "mula" else CODEC).to_dict()
        Path(f"{folder}/config.json").write_text(json.dumps(config))
"""

LOAD = (
    PEAK
    + WRITE
    + """
import vramkit.heartmula.loading, vramkit.checkpoint, vramkit.parts
from vramkit.heartmula.loading import codec_factory, load_model, model_factory
from vramkit.lazy_pipeline import LazyPipeline
from vramkit.model_objects import tensors_of
what, folder = sys.argv[1:3]
cpu = torch.device("cpu")
if what == "mula":
    factory = model_factory(Path(folder))
    load = lambda: load_model(Path(folder), factory, "int8", torch.bfloat16, cpu)
elif what == "codec":
    factory = codec_factory(Path(folder))
    load = lambda: load_model(Path(folder), factory, None, torch.float32, cpu)
else:
    class Pipe:
        def __init__(self):
            self.model = vramkit.load(f"{folder}/model.safetensors", precision="int8",
                                      factory=partformer)
    lazy = LazyPipeline(Pipe)
    def load():
        lazy.load()
        with lazy.lease() as loaded:
            return loaded
# torch imports its decompositions at the first normal_ on meta, 150 MB of modules: not of a load.
nn.Embedding(2, 2, device="meta")
with Peak() as peak:
    made = load()
tensors = list(tensors_of(made))
steady = sum(t.nbytes for t in tensors)
print(json.dumps({"peak": peak.bytes, "steady": steady}))
"""
)


@pytest.mark.parametrize("what", ["mula", "codec", "partformer"])
def test_peak_of_loading(what: str, tmp_path: Path, run_python: RunPython) -> None:
    root = str(Path(__file__).parents[2])
    script = WRITE + f"\nwrite({what!r}, sys.argv[2], 'model.safetensors')"
    run_python(script, what, tmp_path, root)
    file = tmp_path / "model.safetensors"
    found = json.loads(run_python(LOAD, what, tmp_path, root).stdout)
    from vramkit.shards import Checkpoint

    stored = Checkpoint(file)
    largest = max(stored.info(name).nbytes for name in stored.names())
    bound = found["steady"] + 2 * largest + SLACK
    print(what, {k: f"{v / 1e6:.0f} MB" for k, v in found.items()}, f"{bound / 1e6:.0f} MB")
    assert found["steady"] <= found["peak"] <= bound
    if what != "codec":  # what holding the plain model beside the converted one would take
        assert file.stat().st_size + found["steady"] > bound
