#!/usr/bin/env bash
# The CPU kernels under the address, undefined-behaviour and thread sanitizers. Outside the suite: bash tests/asan.sh
set -euo pipefail
cd "$(dirname "$0")/.."

build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
for sanitizer in address,undefined thread; do
  "${CXX:-c++}" -std=c++17 -O1 -g -fopenmp-simd -pthread "-fsanitize=$sanitizer" -fno-sanitize-recover=all -Icsrc \
    csrc/cpu/pgd_step.cpp tests/ops/asan_pgd_step.cpp -o "$build/run"
  echo "$sanitizer: $("$build/run")"
done
