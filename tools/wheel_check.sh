#!/usr/bin/env bash
# Fails unless the wheel $1 holds the package's files and no others, exports nothing but the entry
# point of _core, needs no library that a user may lack, and keeps to torch's stable ABI. One built with
# CUDA has operators for it, which are loaded beside a torch with CUDA alone: they may name its library.
set -euo pipefail
wheel=$(realpath "$1")
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python -m zipfile -e "$wheel" "$folder"

list() { sort -u | grep -v -e '\.dist-info/' -e '__pycache__/'; }
expected=$({ cd python && find vramkit pytest_vramkit -type f ! -name '*.so' ! -path '*_cache/*'; echo vramkit/_core.so; echo vramkit/_ops.so
  if [ -e "$folder/vramkit/_ops_cuda.so" ]; then echo vramkit/_ops_cuda.so; fi; } | list)
held=$(cd "$folder" && find . -type f -printf '%P\n' | sed 's|^\(vramkit/_core\)\.[^/]*\.so$|\1.so|' | list)
diff <(echo "$expected") <(echo "$held") || { echo "$wheel: files missing (<) or stray (>)"; exit 1; }

for module in "$folder"/vramkit/*.so; do
  stray=$(nm -D --defined-only "$module" | awk '$3 != "PyInit__core" {print $3}')
  [ -z "$stray" ] || { echo "$module exports:"; echo "$stray" | c++filt; exit 1; }
  foreign=$(readelf -d "$module" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p; s/.*(R\(UN\)\?PATH).*/&/p' |
    grep -v -E '^(lib(torch_cpu\.so|stdc\+\+\.so\.6|m\.so\.6|dl\.so\.2|rt\.so\.1|pthread\.so\.0|gcc_s\.so\.1|c\.so\.6)|ld-linux.*)$' || true)
  if [ "$(basename "$module")" = _ops_cuda.so ]; then foreign=$(echo "$foreign" | grep -v -x 'libtorch_cuda\.so' || true); fi
  [ -z "$foreign" ] || { echo "$module needs: $foreign"; exit 1; }
done

torch-abi-audit --check torch "$folder/vramkit" | tee "$folder/audit"
grep -q 'Torch ABI: *STABLE' "$folder/audit"
grep -q 'Min torch: *2\.11\.0' "$folder/audit"
ls -l "$wheel"
