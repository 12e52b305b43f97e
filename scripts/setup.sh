#!/usr/bin/env bash
# Makes the Python environment that the build, the tests and the demo use. Usage: scripts/setup.sh VENV
set -euo pipefail
venv=$1
here=$(cd "$(dirname "$0")/.." && pwd)
missing=0
"$here/scripts/need.sh" cargo c++ || missing=1
command -v npm >/dev/null || echo "note: npm is missing; \`make demo\` and the tests of Azure need it (Debian: apt-get install npm), nothing else does." >&2
if [ ! -x "$venv/bin/python" ]; then
  python=$("$here/scripts/python.sh") || missing=1
fi
# All that is missing is said at once.
[ "$missing" = 0 ] || exit 1
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --disable-pip-version-check -r "$here/requirements.txt"
"$here/scripts/libtorch.sh" "$venv"
