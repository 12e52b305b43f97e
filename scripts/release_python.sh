#!/usr/bin/env bash
# The Python packages with extensions that are built for release, in a folder of their own: target/release/python. Benchmarks put it
# on PYTHONPATH. The extensions in the tree stay those of `make build`, which tests use. Run it where Cargo.toml is.
set -euo pipefail
out=target/release/python
rm -rf "$out"
mkdir -p "$out"
cp -r client/python/python/superbatch scoring-kernels/python/python/superbatch_kernels "$out"
cp -f target/release/lib_superbatch.so "$out/superbatch/_superbatch.abi3.so"
cp -f target/release/lib_kernels.so "$out/superbatch_kernels/_kernels.abi3.so"
