#!/usr/bin/env bash
# One command for a machine with an NVIDIA GPU and no network: build with CUDA, run the gpu tests and the benches, print
# one table with fractions of the measured device copy bandwidth. Needs python3 with torch (CUDA), scikit-build-core,
# pybind11, pytest and numpy, and nvcc, cmake and ninja. Under 8 minutes; a failing step is reported, the table prints.
#
#   bench/on_gpu.sh            results in gpu-results/, or in $OUT
#   PYTHON=python3.12 LIMIT=400 bench/on_gpu.sh
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
out=${OUT:-gpu-results}
python=${PYTHON:-python3}
limit=${LIMIT:-465} # seconds for everything
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd) || exit 1
command -v nvcc >/dev/null || PATH=$PATH:/usr/local/cuda/bin
log=$out/log.txt
steps=$out/steps.txt
: >"$log"
: >"$steps"
scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT
prefix=$scratch/prefix
output=$scratch/output.txt
export PYTHONPATH=$prefix${PYTHONPATH:+:$PYTHONPATH}
export OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1
failures=0

# step NAME SECONDS COMMAND...: run within its own limit and what is left of the whole one; log it, note how it ended.
step() {
  local name=$1 most=$2 begin=$SECONDS status
  shift 2
  local left=$((limit - SECONDS))
  if ((left < 5)); then
    echo "$name: left out, out of time" | tee -a "$steps"
    failures=$((failures + 1))
    return 1
  fi
  ((most < left)) || most=$left
  printf '\n== %s: %s\n' "$name" "$*" >>"$log"
  timeout --kill-after=5 "$most" "$@" >"$output" 2>&1
  status=$?
  cat "$output" >>"$log"
  case $status in
  0) echo "$name: ok, $((SECONDS - begin)) s" ;;
  124 | 137) echo "$name: stopped after $most s" ;;
  *) echo "$name: FAILED with status $status after $((SECONDS - begin)) s" ;;
  esac | tee -a "$steps"
  if ((status != 0)); then
    failures=$((failures + 1))
    echo "  last lines:"
    tail -n 8 "$output" | sed 's/^/  | /'
  fi
  return "$status"
}

describe='
import sys, torch
print("python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda)
if not torch.cuda.is_available():
    sys.exit("torch sees no CUDA device")
print(torch.cuda.get_device_properties(0))
'
check='
import kantor
print(kantor.__version__, kantor.__file__)
assert kantor.cuda.is_available(), "built, but kantor.cuda.is_available() is False"
'
build=("$python" -m pip install --no-build-isolation --no-deps --no-index --upgrade --target "$prefix" .
  -C cmake.define.KANTOR_CUDA=ON)

step driver 20 nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem --format=csv
step compiler 20 nvcc --version
step torch 60 "$python" -c "$describe"
# The tests' own modules need more than the package does; if they do not build, the benches can still run.
step "build with tests" 200 "${build[@]}" -C cmake.define.KANTOR_TESTS=ON ||
  step "build without tests" 150 "${build[@]}" -C cmake.define.KANTOR_TESTS=OFF
step import 60 "$python" -c "$check"
step "gpu tests" 150 "$python" -m pytest -m gpu -q --maxfail=20 --continue-on-collection-errors -p no:cacheprovider \
  tests
rm -f "$out/roofline.jsonl" "$out/cg.jsonl" # so that no old figure is taken for a new one
step roofline 45 "$python" bench/roofline.py --device cuda -o "$out/roofline.jsonl"
step "pressure solves" 60 "$python" bench/linalg/bench_pressure_cuda.py
step "direction networks" 60 "$python" bench/linalg/bench_direction_net_cuda.py
step "graph kernels" 60 "$python" bench/graph/bench_graph_cuda.py
step "capped conjugate gradients" 40 "$python" bench/linalg/bench_capped.py --device cuda --size 10000000
left=$((limit - SECONDS - 15))
step "conjugate gradients" 220 "$python" bench/run.py cg --device cuda --threads 1 --sizes 64 128 256 512 \
  --dtypes float64 float32 --repeats 3 --time-limit "$((left < 200 ? left : 200))" -o "$out"

{
  echo "== Steps ($SECONDS s in all, $failures not ok)"
  cat "$steps"
  echo
  "$python" -c "$describe" || true
  echo
  "$python" bench/gpu_table.py "$out"
} 2>&1 | tee "$out/table.txt"
exit "$((failures > 0))"
