#!/usr/bin/env bash
# Runs the device tests on CUDA. Where there is Rust, builds the test binaries into target/gpu-tests first; a GPU machine without
# Rust runs those that another machine built. Where there is no GPU it builds, says loudly that nothing ran, and exits with 0.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${SUPERBATCH_PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3)
binaries=target/gpu-tests

if command -v cargo >/dev/null; then
  rm -rf "$binaries"
  mkdir -p "$binaries"
  flags=(--workspace --features "$(scripts/features.sh)")
  cargo build "${flags[@]}"
  cargo test "${flags[@]}" --no-run --message-format=json-render-diagnostics | "$python" -c '
import json, sys
for line in sys.stdin:
    built = json.loads(line)
    if built.get("executable") and built.get("profile", {}).get("test"):
        print(built["executable"])' | while read -r executable; do
    name=$(basename "$executable")
    strip -o "$binaries/${name%-*}-${name##*-}" "$executable"
  done
  strip -o "$binaries/superbatch" target/debug/superbatch
fi

if [ ! -d "$binaries" ]; then
  echo "test-gpu: no test binaries in $binaries and no cargo to build them with. Run \`make test-gpu\` where Rust is, copy the folder here." >&2
  exit 1
fi
if ! "$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)' 2>/dev/null; then
  echo "test-gpu: SKIPPED. No CUDA device (or no torch with CUDA) here: nothing was tested on a GPU." >&2
  exit 0
fi

torch_lib=$("$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent / "lib")')
export LD_LIBRARY_PATH="$torch_lib:${LD_LIBRARY_PATH:-}"
export SUPERBATCH_TEST_DEVICE=cuda SUPERBATCH_PYTHON="$python" SUPERBATCH_BINARY="$PWD/$binaries/superbatch"
# The binaries link LibTorch without its CUDA half; tests that use no worker would not load it.
export LD_PRELOAD="$torch_lib/libtorch_cuda.so"
failed=()
for binary in "$binaries"/*; do
  [ "$binary" = "$binaries/superbatch" ] && continue
  echo "== $(basename "$binary")"
  "$binary" || failed+=("$(basename "$binary")")
done
if [ "${#failed[@]}" -gt 0 ]; then
  echo "test-gpu: FAILED on the GPU: ${failed[*]}" >&2
  exit 1
fi
echo "test-gpu: all passed on $("$python" -c 'import torch; print(torch.cuda.get_device_name())')"
