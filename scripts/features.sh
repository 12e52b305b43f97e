#!/usr/bin/env bash
# One set of features for building and testing, so that nothing is built twice. JPEG's vector code comes in where its assembler is
# there; the pixels are the same without.
set -euo pipefail
features=superbatch-python/extension-module
if command -v nasm >/dev/null; then features+=,superbatch-server/jpeg-simd; fi
echo "$features"
