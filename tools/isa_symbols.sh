#!/usr/bin/env bash
# Fails if an instruction-set unit exports anything besides its table: a weak symbol compiled with
# AVX flags could be the copy that the linker keeps for everyone. $1: a build folder.
set -euo pipefail
found=0
while IFS= read -r object; do
  unit=$(basename "$object" .cpp.o)
  # DW.ref.* refers to the exception personality: data that every unit has alike.
  stray=$(nm -C --defined-only --extern-only "$object" | grep -v " DW\.ref\." | grep -v "${unit}_kernels()" || true)
  if [ -n "$stray" ]; then
    echo "$object exports:"
    echo "$stray"
    exit 1
  fi
  found=$((found + 1))
done < <(find "$1" -name 'avx*.cpp.o')
[ "$found" -ge 2 ] || { echo "expected the AVX2 and AVX-512 units under $1, found $found"; exit 1; }
echo "$found instruction-set units export their tables alone"
