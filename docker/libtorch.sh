#!/usr/bin/env bash
# Lays out what the server is linked to: headers, libtorch_cpu and libc10, and no CUDA.
#   docker/libtorch.sh FOLDER-OF-PACKAGES OUT
set -euo pipefail
package=$1/torch
out=$2
mkdir -p "$out/lib"
ln -s "$package/include" "$out/include"
ln -s "$package"/lib/libtorch_cpu.so "$package"/lib/libc10.so "$out/lib/"
ln -s "$package"/lib/libgomp*.so* "$out/lib/libgomp.so"
echo 'INPUT(-ltorch_cpu)' > "$out/lib/libtorch.so"
sed -n "s/^__version__ = '\(.*\)'/\1/p" "$package/version.py" > "$out/build-version"
