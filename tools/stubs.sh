#!/usr/bin/env bash
# Writes the stub of the installed native module; with --check, fails if the one in the tree differs.
set -euo pipefail
cd "$(dirname "$0")/.."
stub=python/vramkit/_core.pyi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# From that folder: the stub is of the package that is installed, whatever lies in the tree.
(cd "$folder" && python -m pybind11_stubgen vramkit._core -o . >log 2>&1) || { cat "$folder/log"; exit 1; }
ruff format --quiet --isolated --line-length 100 "$folder/vramkit/_core.pyi"
if [ "${1:-}" = --check ]; then
  diff -u "$stub" "$folder/vramkit/_core.pyi" ||
    { echo "$stub is out of date: run tools/stubs.sh and commit it"; exit 1; }
else
  cp "$folder/vramkit/_core.pyi" "$stub"
fi
