#!/usr/bin/env bash
# Fails unless the wheel $1 keeps to torch's stable ABI, exports nothing of its own but the module's
# entry point, and holds what it should.
set -euo pipefail
wheel=$1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python -m zipfile -e "$wheel" "$folder"
for file in _ops.so py.typed _core.pyi cli.py; do
  [ -e "$folder/vramkit/$file" ] || { echo "$wheel lacks vramkit/$file"; exit 1; }
done
for module in "$folder"/vramkit/_core*.so "$folder"/vramkit/_ops.so; do
  # Weak and unique symbols are the C++ library's own templates, which every C++ module shares.
  stray=$(nm -D --defined-only "$module" | awk '$2 ~ /[A-Z]/ && $2 !~ /[VWu]/ {print $3}' | grep -v '^PyInit__core$' || true)
  [ -z "$stray" ] || { echo "$module exports: $stray"; exit 1; }
done
torch-abi-audit --check torch "$folder/vramkit" | tee "$folder/audit"
grep -q 'STABLE' "$folder/audit"
if grep -q 'UNSTABLE' "$folder/audit"; then exit 1; fi
ls -l "$wheel"
