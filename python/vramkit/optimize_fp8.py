"""`python -m vramkit.optimize_fp8`: HeartMuLa's weights to 8 bit in files, and a benchmark of it.

The flags and files of HeartMuLa's guide. What the guide calls FP8 is LLM.int8; so it is here,
unless `--precision` names another.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import VramkitError
from .sizes import GIB, format_size
from .text_file import replace_text

VERSIONS = ("3B", "7B")
DEFAULT = {
    "load_in_8bit": True,
    "llm_int8_threshold": 6.0,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_enable_fp32_cpu_offload": False,
}
LYRICS = "[verse]\nThe river runs below the town\n[chorus]\nCarry me over, carry me down"
TAGS = "folk,guitar,warm,female vocal"


def quantize(
    model_path: str | os.PathLike[str],
    version: str,
    output_path: str | os.PathLike[str],
    precision: Any = None,
) -> dict[str, Any]:
    """Write the language model in `precision` below `output_path`, tensor by tensor.

    The folder can be given to `HeartMuLaGenPipeline.from_pretrained`: it holds the tokenizer's and
    the generation's files too, and a link to the codec. Returns what `quantization_config.json`
    holds.
    """
    from .checkpoint import convert_checkpoint
    from .heartmula.loading import formats_of, model_factory
    from .heartmula.pipeline import _checked
    from .skeleton import build_skeleton

    source, target = Path(model_path), Path(output_path)
    _checked(source, version)
    name = f"HeartMuLa-oss-{version}"
    asked = DEFAULT if precision is None else precision
    factory = model_factory(source / name)
    by_layer, _ = formats_of(build_skeleton(source / name, factory), asked)
    target.mkdir(parents=True, exist_ok=True)
    sizes = convert_checkpoint(source / name, target / name, by_layer, factory=factory)
    for file in ("tokenizer.json", "gen_config.json"):
        shutil.copyfile(source / file, target / file)
    codec = target / "HeartCodec-oss"
    if not codec.exists():
        codec.symlink_to((source / "HeartCodec-oss").resolve(), target_is_directory=True)
    config = {
        **(asked if isinstance(asked, dict) else {"precision": str(asked)}),
        "version": version,
        "model_path": str(source),
        "quantized_path": str(target / name),
        "formats": sorted({fmt.name for fmt in by_layer.values()}),
        **sizes,
    }
    replace_text(target / "quantization_config.json", json.dumps(config, indent=2) + "\n")
    return config


def benchmark(
    folder: str | os.PathLike[str],
    version: str,
    output_path: str | os.PathLike[str],
    device: str = "cpu",
    *,
    seconds: float = 10.0,
) -> dict[str, Any]:
    """Make `seconds` of music and write the documented files; returns the results.

    rtf is time over the sound's real length. On CUDA memory is torch's peak, which is reset before
    the run; on a CPU the process's resident memory now, and its highest.
    """
    import torch

    from .heartmula import HeartMuLaGenPipeline
    from .heartmula.sound import mp3_encoder, save_sound

    target = Path(output_path)
    cuda = torch.device(device).type == "cuda"
    pipe = HeartMuLaGenPipeline.from_pretrained(folder, device=device, version=version)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    made = pipe(
        {"lyrics": LYRICS, "tags": TAGS},
        max_audio_length_ms=round(1000 * seconds),
        save_path=target / "benchmark_output.wav",
        seed=0,
    )
    if cuda:
        torch.cuda.synchronize()
    took = time.perf_counter() - start
    if mp3_encoder() is not None:
        save_sound(target / "benchmark_output.mp3", made.wav, made.sample_rate)
    if cuda:
        allocated = torch.cuda.max_memory_allocated() / GIB
        reserved = torch.cuda.max_memory_reserved() / GIB
    else:
        allocated = _resident() / GIB
        reserved = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    results = {
        "generation_time_seconds": took,
        "audio_length_seconds": made.seconds,
        "rtf": took / made.seconds,
        "memory_allocated_gb": allocated,
        "memory_reserved_gb": reserved,
        "memory_of": "torch's CUDA allocator" if cuda else "the process: resident, and its highest",
        "kv_cache_bytes": made.cache_bytes,
        "device": str(device),
    }
    replace_text(target / "benchmark_results.json", json.dumps(results, indent=2) + "\n")
    return results


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def run(
    model_path: str,
    version: str = "3B",
    device: str | None = None,
    with_benchmark: bool = False,
    output_path: str = ".",
    precision: str | None = None,
    seconds: float = 10.0,
) -> dict[str, Any]:
    """What the script does: quantize, and benchmark if asked to."""
    import torch

    if version not in VERSIONS:
        raise ValueError(f"version is one of {', '.join(VERSIONS)}, not {version!r}")
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.device(place)
    found = {"quantization": quantize(model_path, version, output_path, precision)}
    if with_benchmark:
        found["benchmark"] = benchmark(output_path, version, output_path, place, seconds=seconds)
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """The result in words."""
    made = found["quantization"]
    said = [
        f"{', '.join(made['formats'])}: {format_size(made['original_bytes'])} -> "
        f"{format_size(made['converted_bytes'])} in {made['quantized_path']}"
    ]
    if "benchmark" in found:
        b = found["benchmark"]
        said.append(
            f"{b['audio_length_seconds']:.1f} s of sound in {b['generation_time_seconds']:.1f} s, "
            f"rtf {b['rtf']:.2f}; {b['memory_allocated_gb']:.2f} GiB ({b['memory_of']})"
        )
    return said


def main(arguments: Sequence[str] | None = None) -> int:
    """The script; 1 and a sentence for what is missing or wrong."""
    parser = argparse.ArgumentParser(prog="optimize_fp8.py", description=__doc__.split("\n")[0])
    parser.add_argument("--model_path", required=True, help="the folder of the checkpoints")
    parser.add_argument("--version", default="3B", choices=VERSIONS)
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--benchmark", action="store_true")
    parser.add_argument("--output_path", default=".", help="where files are written")
    parser.add_argument("--precision", help="in place of LLM.int8: int8, fp8, nf4_dq, …")
    parser.add_argument("--seconds", type=float, default=10.0, help="of music, for --benchmark")
    given = parser.parse_args(arguments)
    try:
        found = run(
            given.model_path,
            given.version,
            given.device,
            given.benchmark,
            given.output_path,
            given.precision,
            given.seconds,
        )
    except (VramkitError, OSError, ValueError, RuntimeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
