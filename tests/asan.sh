#!/usr/bin/env bash
# The CPU kernels under the address, undefined-behaviour and thread sanitizers. Outside the suite: bash tests/asan.sh
set -euo pipefail
cd "$(dirname "$0")/.."

build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
for sanitizer in address,undefined thread; do
  for check in tests/ops/asan_*.cpp; do
    op=$(basename "$check" .cpp) && op=${op#asan_}
    "${CXX:-c++}" -std=c++17 -O1 -g -fopenmp-simd -pthread "-fsanitize=$sanitizer" -fno-sanitize-recover=all -Icsrc \
      "csrc/cpu/$op.cpp" "$check" -o "$build/run"
    echo "$op, $sanitizer: $("$build/run")"
  done
done
