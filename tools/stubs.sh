#!/usr/bin/env bash
# Writes the stub of the installed native module; with --check, fails if the one in the tree differs.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
(cd "$folder" && python -m pybind11_stubgen vramkit._core -o "$folder" >/dev/null 2>"$folder/log") || { cat "$folder/log"; exit 1; }
# Sets have no order of their own in what the generator prints.
if [ "${1:-}" = --check ]; then
  diff -u python/vramkit/_core.pyi "$folder/vramkit/_core.pyi" ||
    { echo "the stub is out of date: run tools/stubs.sh and commit"; exit 1; }
else
  cp "$folder/vramkit/_core.pyi" python/vramkit/_core.pyi
fi
