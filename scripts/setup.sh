#!/usr/bin/env bash
# Makes the Python environment that the build, the tests and the demo use. Usage: scripts/setup.sh VENV
set -euo pipefail
venv=$1
here=$(cd "$(dirname "$0")/.." && pwd)
"$here/scripts/need.sh" cargo c++ python3.11
command -v npm >/dev/null || echo "note: npm is missing; \`make demo\` needs it (Debian: apt-get install npm), nothing else does." >&2
if [ ! -x "$venv/bin/python" ]; then
  if ! python3.11 -c 'import ensurepip, venv' 2>/dev/null; then
    echo "missing: Python's venv module. Get it with: apt-get install python3.11-venv (Debian)." >&2
    exit 1
  fi
  python3.11 -m venv "$venv"
fi
"$venv/bin/python" -m pip install --disable-pip-version-check -r "$here/requirements.txt"
"$here/scripts/libtorch.sh" "$venv"
