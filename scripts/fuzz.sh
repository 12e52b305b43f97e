#!/usr/bin/env bash
# Fuzzes the readers of what others make: `make fuzz SECONDS=60 TARGET=tar`. Needs stable Rust and a C++ compiler, and nothing
# else.
#   scripts/fuzz.sh [SECONDS [TARGET...]]     each target (all of fuzz/seeds) for so many seconds
#   scripts/fuzz.sh run TARGET FILE...        a target on inputs, to look at what was found
# FUZZ_BUILD: the folder of the build. FUZZ_OUT: where inputs that cover something new are kept from run to run, and what is
# found. FUZZ_JOBS: processes of the build. It ends with 1 if something was found.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/need.sh cargo c++
build=${FUZZ_BUILD:-target/fuzz/build}
out=${FUZZ_OUT:-target/fuzz}
host=$(rustc -vV | sed -n 's/^host: //p')

# What cargo-fuzz passes, without a sanitizer, which stable Rust has not. With --target the flags are those of the targets, and
# not of build scripts. Versions are those of the product, and libfuzzer-sys is added to them.
flags=(-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
  -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares)
[ fuzz/Cargo.lock -nt Cargo.lock ] || cp Cargo.lock fuzz/Cargo.lock
RUSTFLAGS="${flags[*]}" cargo build --manifest-path fuzz/Cargo.toml --target "$host" --target-dir "$build" \
  ${FUZZ_JOBS:+--jobs "$FUZZ_JOBS"}
fuzz=$build/$host/debug/fuzz

if [ "${1:-}" = run ]; then
  FUZZ_TARGET=${2:?name a target} "$fuzz" "${3:?name a file}" "${@:4}"
  exit
fi

seconds=${1:-60}
targets=("${@:2}")
[ "${#targets[@]}" -gt 0 ] || mapfile -t targets < <(ls fuzz/seeds)
found=0
for target in "${targets[@]}"; do
  if [ ! -d "fuzz/seeds/$target" ]; then
    echo "fuzz: there is no target $target; it is one of $(ls fuzz/seeds | paste -sd ' ')." >&2
    exit 2
  fi
  mkdir -p "$out/corpus/$target" "$out/found/$target"
  inputs=("$out/corpus/$target" "fuzz/seeds/$target")
  [ ! -d "fuzz/found/$target" ] || inputs+=("fuzz/found/$target")
  log=$out/$target.log
  status=0
  # An input may be of 16 KiB, take 20 s and 8 GiB with all libraries; what Rust code holds is bounded by the target itself.
  FUZZ_TARGET=$target "$fuzz" -max_total_time="$seconds" -max_len=16384 -timeout=20 -rss_limit_mb=8192 -print_final_stats=1 \
    -artifact_prefix="$out/found/$target/" "${inputs[@]}" >"$log" 2>&1 || status=$?
  runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
  coverage=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$log" | tail -1)
  printf '%-12s %10s executions  %6s edges covered  ' "$target" "${runs:-?}" "${coverage:-?}"
  if [ "$status" = 0 ]; then
    echo "nothing found"
    continue
  fi
  found=1
  echo "FOUND something; the log is $log"
  # Not by `head`: sed would die of its closed pipe, and the script with it.
  awk '/FOUND by/ { found = 1 }
    (found || /ERROR: libFuzzer/) && shown < 40 { print; shown += 1 }
    /^ *[0-9]+: fuzz::targets/ { found = 0 }' "$log"
  sed -n 's/.*Test unit written to \(.*\)/  again: scripts\/fuzz.sh run '"$target"' \1/p' "$log"
  echo "  when it is mended, put the input into fuzz/found/$target: \`make test\` runs it from then on"
done
exit "$found"
