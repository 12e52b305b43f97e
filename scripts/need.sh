#!/usr/bin/env bash
# Says plainly which of the named tools are missing and how to get them. Usage: scripts/need.sh TOOL...
set -euo pipefail
declare -A how=(
  [cargo]="Rust 1.95 or later: https://rustup.rs, then open a new shell"
  [c++]="a C++ compiler: apt-get install g++ (Debian), or your system's build tools"
  [npm]="npm: apt-get install npm (Debian), or https://nodejs.org; only the demo needs it"
)
missing=0
for tool in "$@"; do
  if ! command -v "$tool" >/dev/null; then
    echo "missing: $tool. Get ${how[$tool]:-it from your system}." >&2
    missing=1
  fi
done
exit "$missing"
