"""The one runner: `python -m benchmarks SUITE [--json PATH]`, suites by name below."""

from __future__ import annotations

import argparse
import importlib
import sys

from .runner import environment, write_json

SUITES = {
    "quality": "error on real weights by format and by budget, against the peers",
    "calibration": "4 and 8 bit on real models, plain and calibrated, against HQQ and others",
    "frontier": "bytes against quality on real weights, and the picture of it",
    "sensitivity": "predicted against measured errors of random plans on real models",
    "imports": "time of `import vramkit` after `import torch`",
    "cpu": "one Linear on the CPU, by format and rows, against the peers and the limit",
    "conversion": "encoding and decoding by format, against a copy's rate and the peers",
    "int8": "dynamic INT8 and LLM.int8 on the CPU, against torch, bitsandbytes and the limit",
    "conv": "convolutions on the CPU, against torch's in bfloat16",
    "allocator": "the allocator simulator: events replayed per second, by trace and options",
    "plan": "the planner: 1,000 layers x 12 formats x 3 places, against HiGHS, greedy and random",
    "estimate": "predicted against measured peaks on a frozen zoo, beside the peers",
    "offload": "offloaded models against copies, direct reads, the arithmetic and accelerate",
    "loading": "checkpoints warm and cold, against safetensors, copies and direct reads",
    "systems": "the five systems: true scale beside claims, small scale by mode, under a limit",
    "interop": "bitsandbytes' operators on our kernels and on its own; memory of a QLoRA step",
    "training": "unscale + norm + clip and AdamW over 300 tensors, against torch's and the memory",
    "savers": "training with memory savers: loss against float32's, peaks against their estimates",
    "lsd": "the video model: trained on moving digits, 1,000 frames by precision, true scale",
    "serve": "the Chatterbox server under 50 clients: lost and mixed-up answers, latency, memory",
}
# Those that take a number of threads.
THREADED = (
    "cpu",
    "conversion",
    "int8",
    "conv",
    "interop",
    "offload",
    "loading",
    "systems",
    "training",
)


def main() -> int:
    """Run one suite; its exit code is 1 where a figure that the project promises is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    suites = parser.add_subparsers(dest="suite", required=True)
    for name, text in SUITES.items():
        sub = suites.add_parser(name, help=text)
        sub.add_argument("--json", metavar="PATH", help="write the results here")
        if name in ("cpu", "int8", "interop"):
            sub.add_argument("--size", type=int, default=4096)
        if name in ("cpu", "int8"):
            sub.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 512])
        if name in THREADED:
            sub.add_argument("--threads", type=int, default=2)
        if name == "training":
            sub.add_argument("--elements", type=int, default=24_000_000)
        if name in ("sensitivity", "frontier"):
            sub.add_argument("--models", nargs="+", metavar="MODEL", help="only these")
            sub.add_argument("--cache", metavar="FOLDER", help="go on with what was measured there")
        if name == "cpu":
            sub.add_argument("--formats", nargs="+", metavar="FORMAT")
            sub.add_argument("--quick", action="store_true", help="one shape, bfloat16 input")
        if name == "offload":
            sub.add_argument("--rows", type=int, default=64)
            sub.add_argument("--many-rows", type=int, default=512, help="bound by arithmetic")
            sub.add_argument("--cold-repeats", type=int, default=4)
            sub.add_argument("--layers", type=int, default=24)
            sub.add_argument("--alone", action="store_true", help="without accelerate")
            sub.add_argument("--larger", action="store_true", help="only a model 4 times larger")
        if name in ("offload", "loading"):
            sub.add_argument("--repeats", type=int, default=7 if name == "offload" else 5)
            sub.add_argument(
                "--folder", help="on the disk to be measured; default: temporary files'"
            )
        if name == "systems":
            sub.add_argument("--systems", nargs="+", metavar="SYSTEM", help="only these")
            sub.add_argument("--quick", action="store_true", help="tiny models, nothing trained")
        if name == "savers":
            sub.add_argument("--models", nargs="+", choices=["llama", "lsd"], help="only these")
            sub.add_argument("--seeds", type=int, default=3)
            sub.add_argument("--steps", type=int, help="of training; 20 and 40 by default")
            sub.add_argument("--threads", type=int, default=1)
        if name == "lsd":
            sub.add_argument("--frames", type=int, default=1000)
            sub.add_argument("--base", type=int, default=16, help="base channels, 16 or 32")
            sub.add_argument("--steps", type=float, default=1.0, help="times the steps of training")
            sub.add_argument("--weights", metavar="FILE", help="trained before, or kept for later")
            sub.add_argument("--precisions", nargs="+", default=["bf16", "fp16", "fp8", "int8"])
            sub.add_argument("--true-scale", action=argparse.BooleanOptionalAction, default=True)
            sub.add_argument("--threads", type=int, default=1)
            sub.add_argument("--report", metavar="FOLDER", help="HTML, Markdown and pictures")
        if name == "serve":
            sub.add_argument("--clients", type=int, default=50)
            sub.add_argument("--seconds", type=float, default=60.0, help="600 at most")
    options = parser.parse_args()
    module = importlib.import_module(f".{options.suite}", __package__)
    result, missed = module.run(options)
    if options.json:
        write_json(options.json, {"environment": environment(), "results": result})
    for line in missed:
        print(f"MISSED: {line}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
