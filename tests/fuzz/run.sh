#!/usr/bin/env bash
# Runs fuzz targets, each for so many minutes: run.sh MINUTES [TARGET…], all of them unless named.
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/../.."
export PATH=$PWD/target/fuzz/bin:$PATH
minutes=$1
shift
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(frame filter cursor policy token image)

# The same versions as the program's.
cp Cargo.lock tests/fuzz/Cargo.lock
fuzz=(cargo +nightly fuzz)
where=(--fuzz-dir tests/fuzz --target-dir target/fuzz/build)
"${fuzz[@]}" build "${where[@]}"
failed=()
for target in "${targets[@]}"; do
  corpus=tests/fuzz/corpus/$target
  mkdir -p "$corpus"
  echo "fuzz: $target for $minutes min" >&2
  # The first folder takes what is found, the second is read only.
  "${fuzz[@]}" run "${where[@]}" "$target" "$corpus" "tests/fuzz/seeds/$target" -- \
    -max_total_time=$((minutes * 60)) -timeout=10 -malloc_limit_mb=256 -print_final_stats=1 \
    >"target/fuzz/$target.log" 2>&1 || failed+=("$target")
  grep -E '^(stat::number_of_executed_units|SUMMARY|thread|.*panicked at)' "target/fuzz/$target.log" >&2 || true
done
for target in ${failed[@]+"${failed[@]}"}; do
  echo "fuzz: $target failed, see target/fuzz/$target.log and tests/fuzz/artifacts/$target" >&2
done
[ ${#failed[@]} = 0 ]
