#!/usr/bin/env bash
# Everything that needs a GPU, in one command of under nine minutes: build, GPU tests, conv, op and step tables.
#
#   bash benchmarks/gpu_acceptance.sh [--device cpu|cuda] [--tiny] [--no-build] [--out FOLDER]
#
# Run it in the repository root. Each stage has its own time limit, and a stage that fails does not stop the next.
# Exit status: 0 if every stage was ok, else 1. Results lie in FOLDER (default: $OUT, else runs/gpu_acceptance), eight
# files and no subfolder, which is what a lent machine gives back: acceptance.log with the summary at its end,
# {conv,ops,step}.{json,md} and step.png, which are written as they grow.
# Environment: PYTHON (default python3), GIT_SHA (named in the results where the tree has no .git).
# A folder wheels/ is installed first, if there is one: packages that the machine lacks and cannot fetch.
set -u

device=cuda tiny=() compile=() build=1 out=${OUT:-runs/gpu_acceptance}
while [ $# -gt 0 ]; do
  case $1 in
    --device) device=$2; shift ;;
    --tiny) tiny=(--tiny --rounds 3 --warmup 1 --threads 1) compile=(--no-compile) ;;
    --no-build) build=0 ;;
    --out) out=$2; shift ;;
    *) echo "gpu_acceptance: unknown argument $1; accepted: --device NAME, --tiny, --no-build, --out FOLDER" >&2; exit 2 ;;
  esac
  shift
done

python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
mkdir -p "$out" || exit 2
log=$out/acceptance.log summary=() failed=0
: >"$log"

# stage NAME LIMIT_SECONDS COMMAND...: run it into the log, note how it ended.
stage() {
  local name=$1 limit=$2 began=$SECONDS status=ok code
  shift 2
  printf '== %s (limit %d s): %s\n' "$name" "$limit" "$*" | tee -a "$log"
  local from
  from=$(wc -l <"$log")
  timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1
  code=$?
  if [ $code -eq 124 ] || [ $code -eq 137 ]; then
    status=timeout
  elif [ $code -ne 0 ]; then
    status=failed
  fi
  local lines=15
  [ $status = ok ] || { failed=1; lines=40; }
  tail -n "+$((from + 1))" "$log" | tail -n $lines | cut -c 1-400
  summary+=("$(printf '%-8s %-8s exit %-4d %4d s of %d' "$name" "$status" "$code" $((SECONDS - began)) "$limit")")
}

install() { # install PYTHON DEVICE
  if compgen -G 'wheels/*.whl' >/dev/null; then
    "$1" -m pip install --no-index --find-links wheels wheels/*.whl || return 1
  fi
  [ "$2" = cpu ] || export PUAT_CUDA=ON # a build without CUDA kernels would leave nothing to accept
  "$1" -m pip install --no-build-isolation --no-deps .
}

# Compiling takes a minute or two of CPU: done beside the GPU tests, where no clock runs, it leaves its code in torch's
# cache on disk, and the step stage finds it there. The cold seconds are those in the log of this stage.
tests() { # tests PYTHON COMPILE...
  local python=$1 code cold
  shift
  cold=$(mktemp -d)
  if [ $# -gt 0 ]; then
    timeout --kill-after=5 135 "$@" --out "$cold" --name cold --rounds 1 --warmup 0 >"$cold/log" 2>&1 &
  fi
  "$python" -m pytest -q -m gpu -p no:cacheprovider --continue-on-collection-errors
  code=$?
  wait
  grep -hs -e '"compile_s"' -e '"graphs"' "$cold/cold.json"
  rm -r "$cold"
  return $code
}
export -f install tests

bench() { # bench NAME LIMIT_SECONDS MORE...
  local name=$1 limit=$2
  shift 2
  stage "$name" "$limit" "$python" "benchmarks/bench_$name.py" --device "$device" --out "$out" "$@" "${tiny[@]}"
}

if [ $build = 1 ]; then
  stage build 75 bash -c 'install "$0" "$1"' "$python" "$device"
fi
cold=()
if [ ${#tiny[@]} = 0 ]; then
  cold=("$python" benchmarks/bench_step.py --device "$device" --preset official-v1 --engine compiled --baseline)
fi
stage device 10 "$python" benchmarks/check_device.py "$device"
stage tests 150 bash -c 'tests "$@"' tests "$python" "${cold[@]}"
bench conv 45 --batch 256 768
bench ops 95 --rounds 25
bench step 130 --preset official-v1 --rounds 5 --warmup 1 --profile "${compile[@]}"

{
  echo "== summary"
  printf '%s\n' "${summary[@]}"
} | tee -a "$log"
exit $failed
