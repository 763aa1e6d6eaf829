# Sourced by scripts of this folder: "stage STAGE.py FLAGS" runs a stage in PROCESSES processes (default:
# one per GPU; without a GPU two, which share the cores).
cores=$(env -u OMP_NUM_THREADS nproc 2> /dev/null || sysctl -n hw.ncpu)  # sysctl: macOS
processes=${PROCESSES:-$(python -c \
  "import torch; print(torch.cuda.device_count() or min(2, $cores))")}
threads=$(((cores + processes - 1) / processes))
# A training on a CPU slows down under glibc's allocator; jemalloc, where it is, does not (docs/stages.md).
export LD_PRELOAD=${LD_PRELOAD-$(python -c \
  "import ctypes.util; print(ctypes.util.find_library('jemalloc') or '')")}

stage() {
  local run=(python)
  [ "$processes" = 1 ] || run=(torchrun --nproc_per_node "$processes")
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads} "${run[@]}" "$@"
}
