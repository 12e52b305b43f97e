#!/usr/bin/env bash
# Prints the Python to make .venv with: $PYTHON where it is set, else the first of python3, python3.13, python3.12, python3.11
# that is one of these versions and has venv. Says what is missing where there is none.
set -euo pipefail
suits='import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else 1)'
without_venv=()
for python in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
  if ! command -v "$python" >/dev/null || ! "$python" -c "$suits" 2>/dev/null; then continue; fi
  if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    echo "$python"
    exit 0
  fi
  without_venv+=("$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')")
done
if [ "${#without_venv[@]}" -gt 0 ]; then
  echo "missing: Python's venv module. Get it with: apt-get install ${without_venv[0]}-venv (Debian, Ubuntu)." >&2
elif [ -n "${PYTHON:-}" ]; then
  echo "PYTHON=$PYTHON is no Python 3.11, 3.12 or 3.13." >&2
else
  echo "missing: Python 3.11, 3.12 or 3.13. Get it with: apt-get install python3 python3-venv (Debian 12 or 13, Ubuntu 24.04)," \
    "or from https://www.python.org; where it has another name, set PYTHON to it." >&2
fi
exit 1
