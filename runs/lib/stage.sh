# Sourced by scripts of this folder, which set config: how stages are run.
cores=$(env -u OMP_NUM_THREADS nproc 2> /dev/null || sysctl -n hw.ncpu)  # sysctl: macOS
processes=${PROCESSES:-$(python -c \
  "import torch; print(torch.cuda.device_count() or min(2, $cores))")}
threads=$(((cores + processes - 1) / processes))
# A training on a CPU slows down under glibc's allocator; jemalloc, where it is, does not (docs/stages.md).
export LD_PRELOAD=${LD_PRELOAD-$(python -c \
  "import ctypes.util; print(ctypes.util.find_library('jemalloc') or '')")}

build() { # FOLDER FLAGS: a dataset, where it is not there yet; from other files by DATA_FLAGS
  local flags
  read -ra flags <<< "${DATA_FLAGS:-}"
  [ -d "$1" ] || python create_squad_dataset.py --config $config --dataset_name "$1" \
    ${flags[@]+"${flags[@]}"} "${@:2}"
}

stage() { # STAGE.py FLAGS: in PROCESSES processes (default: one per GPU; two share the cores of a CPU)
  local run=(python)
  [ "$processes" = 1 ] || run=(torchrun --nproc_per_node "$processes")
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads} "${run[@]}" "$@"
}
