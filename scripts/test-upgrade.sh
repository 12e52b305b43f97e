#!/usr/bin/env bash
# Tests of an upgrade, with the server of an older commit as what is upgraded: `make test-upgrade FROM=commit`.
#   scripts/test-upgrade.sh COMMIT
# The older server is built in target/older, from a work tree of its own, and kept there by its commit.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "$#" -ne 1 ]; then
  echo "test-upgrade: name the older commit, as in \`make test-upgrade FROM=HEAD~20\`." >&2
  exit 2
fi
commit=$(git rev-parse --verify --short=12 "$1^{commit}")
root=$PWD
older=$root/target/older/$commit
if [ ! -x "$older/superbatch" ]; then
  mkdir -p "$older"
  git worktree add --detach --force "$older/tree" "$commit"
  trap 'git -C "$root" worktree remove --force "$older/tree"' EXIT
  (
    cd "$older/tree"
    ln -sfn "$root/.venv" .venv
    CARGO_TARGET_DIR=$root/target/older/build cargo build -p superbatch-server
  )
  cp "$root/target/older/build/debug/superbatch" "$older/superbatch"
fi
SUPERBATCH_OLD_BINARY=$older/superbatch "${SUPERBATCH_PYTHON:-.venv/bin/python}" -m pytest -rs tests/python/test_upgrade.py
