#!/usr/bin/env bash
# Lays out .venv/libtorch from the torch wheel for the linker: only libtorch_cpu and libc10, so that binaries start
# without CUDA's libraries. Usage: scripts/libtorch.sh VENV
set -euo pipefail
venv=$(cd "$1" && pwd)
package=$("$venv/bin/python" -c 'import importlib.util, pathlib; print(pathlib.Path(importlib.util.find_spec("torch").origin).parent)')
rm -rf "$venv/libtorch"
mkdir -p "$venv/libtorch/lib"
ln -sfn "$package" "$venv/torch"
ln -s "$package/include" "$venv/libtorch/include"
for library in libtorch_cpu.so libc10.so; do ln -s "$package/lib/$library" "$venv/libtorch/lib/$library"; done
ln -s "$package/lib/libgomp.so.1" "$venv/libtorch/lib/libgomp.so"
echo 'INPUT(-ltorch_cpu)' > "$venv/libtorch/lib/libtorch.so"
"$venv/bin/python" - <<'PY' > "$venv/libtorch/build-version"
import importlib.metadata
print(importlib.metadata.version("torch"))
PY
