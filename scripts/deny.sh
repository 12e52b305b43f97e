#!/usr/bin/env bash
# Checks the licences, versions and sources of all dependencies, if cargo-deny is installed. If not, says so.
set -euo pipefail
if command -v cargo-deny >/dev/null; then
  cargo deny --offline check bans licenses sources
else
  echo "note: cargo-deny is missing, so that dependencies' licences, versions and sources are not checked: cargo install --locked cargo-deny" >&2
fi
