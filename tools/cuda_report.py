"""What the CUDA kernels became: registers, shared memory, stack and spills of each, and bytes.

    python tools/cuda_report.py [--architectures 80 90 120 | --release] [--json FILE] [--nvcc NVCC]
    python tools/cuda_report.py --log FILE
    python tools/cuda_report.py --wheel FILE

Compiles csrc/cuda/*.cu with the package's own options and reads what ptxas says. Needs a compiler
and no GPU. Fails if a kernel spills or keeps arrays in local memory: what is hot must not.
--log: the same of a build's output, made with VRAMKIT_CUDA_REPORT=1 in the environment.
--release: for all architectures that released wheels name. --wheel: what a built wheel's libraries
take, packed and unpacked, and nothing is compiled.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
# Bytes: a compiler's last register or two, which a cache line holds; arrays in memory are larger.
ALLOWED = 16
RELEASED = ["75", "80", "86", "89", "90", "100", "120"]


def options() -> list[str]:
    """The options that cmake/Cuda.cmake gives to every kernel."""
    text = (ROOT / "cmake" / "Cuda.cmake").read_text()
    found = re.search(r"set\(VRAMKIT_CUDA_OPTIONS ([^)]*)\)", text)
    assert found is not None
    return ["-std=c++20", "-O3", *found[1].split()]


def short(mangled: list[str]) -> list[str]:
    """Readable names, without namespaces and arguments."""
    done = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    )
    names = []
    for name in done.stdout.splitlines():
        name = re.sub(r"\(vramkit::cuda::(?:Codes|Element)\)", "", name)
        name = re.sub(r"^void |vramkit::|cuda::|\(anonymous namespace\)::", "", name)
        names.append(name.split("(")[0])
    return names


def compile_one(nvcc: str, source: Path, architecture: str, folder: Path) -> tuple[str, int]:
    """ptxas' words about one file for one architecture, and the bytes of its machine code."""
    out = folder / f"{source.stem}.{architecture}.cubin"
    command = [nvcc, *options(), f"-arch=sm_{architecture}", f"-I{ROOT / 'csrc'}", "-Xptxas=-v"]
    done = subprocess.run(
        [*command, "-cubin", "-o", str(out), str(source)], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{source.name} for {architecture}:\n{done.stdout}{done.stderr}")
    return done.stderr + done.stdout, out.stat().st_size


def rows_of(text: str) -> list[dict[str, object]]:
    """One row per kernel in what ptxas said."""
    rows: list[dict[str, object]] = []
    for line in text.splitlines():
        if entry := ENTRY.search(line):
            rows.append({"kernel": entry[1], "architecture": entry[2], "shared_bytes": 0})
        elif spills := SPILLS.search(line):
            rows[-1].update(stack_bytes=int(spills[1]), spill_bytes=int(spills[2]) + int(spills[3]))
        elif used := USED.search(line):
            rows[-1]["registers"] = int(used[1])
            if shared := SHARED.search(line):
                rows[-1]["shared_bytes"] = int(shared[1])
    for row, name in zip(rows, short([str(row["kernel"]) for row in rows]), strict=True):
        row["kernel"] = name
    return rows


def report(kernels: list[dict[str, object]]) -> int:
    """Print them, and say whether all of them stay in registers."""
    kept = ("spill_bytes", "stack_bytes")
    bad = [row for row in kernels if any(int(str(row[k])) > ALLOWED for k in kept)]
    architectures = sorted({str(row["architecture"]) for row in kernels}, key=int)
    print(f"registers for {', '.join(architectures)}; shared bytes; kernel")
    for kernel in sorted({str(row["kernel"]) for row in kernels}):
        mine = [row for row in kernels if row["kernel"] == kernel]
        used = " ".join(f"{row['registers']:>4}" for row in mine)
        print(f"  {used}  {mine[0]['shared_bytes']:>6}  {kernel}")
    for row in bad:
        print(f"in memory: {row['kernel']} for {row['architecture']}")
    print(f"{len(kernels)} kernels, {len(bad)} with over {ALLOWED} bytes of spills or local memory")
    return 1 if bad or not kernels else 0


def print_wheel(path: Path) -> None:
    """Bytes of a wheel and of the libraries in it."""
    print(f"{path.name}: {path.stat().st_size:,} bytes")
    with zipfile.ZipFile(path) as wheel:
        for info in wheel.infolist():
            if ".so" in info.filename:
                print(f"  {info.filename}: {info.compress_size:,} of {info.file_size:,}")


def main() -> int:
    """Compile, print, and say whether all of it stays in registers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", nargs="+", default=["80", "90", "120"])
    parser.add_argument("--release", action="store_true", help="for " + " ".join(RELEASED))
    parser.add_argument("--log", type=Path, metavar="FILE", help="of a build, which is read")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="print its sizes, no more")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--nvcc", default=os.environ.get("CUDACXX") or shutil.which("nvcc"))
    arguments = parser.parse_args()
    if arguments.wheel:
        print_wheel(arguments.wheel)
        return 0
    if arguments.log:
        return report(rows_of(arguments.log.read_text()))
    if arguments.release:
        arguments.architectures = RELEASED
    if not arguments.nvcc:
        sys.exit("no nvcc: put it on PATH, name it by --nvcc or CUDACXX")
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    kernels: list[dict[str, object]] = []
    sizes = []
    with tempfile.TemporaryDirectory() as name, concurrent.futures.ThreadPoolExecutor(2) as pool:
        jobs = {
            pool.submit(compile_one, arguments.nvcc, source, architecture, Path(name)): (
                source,
                architecture,
            )
            for source in sources
            for architecture in arguments.architectures
        }
        for job, (source, architecture) in jobs.items():
            text, nbytes = job.result()
            kernels += rows_of(text)
            sizes.append({"file": source.name, "architecture": architecture, "bytes": nbytes})
    for row in sizes:
        print(f"{row['file']}, sm_{row['architecture']}: {row['bytes']:,} bytes of machine code")
    status = report(kernels)
    if arguments.json:
        text = json.dumps({"machine_code": sizes, "kernels": kernels}, indent=1)
        arguments.json.write_text(text + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
