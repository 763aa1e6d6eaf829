# Sourced by scripts of this folder, which set config: how stages are run.
number() { # NAME VALUE: refuse what is no number above 0
  [[ $2 =~ ^[1-9][0-9]*$ ]] && return
  echo "$(basename "$0"): $1=$2 is no number above 0, in digits" >&2
  exit 2
}
for variable in QUESTIONS ASKED PROCESSES; do
  [ -z "${!variable:-}" ] || number $variable "${!variable}"
done
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

plan() { # QUESTIONS BATCH: the flags of a training on so many, in `planned`
  # A step holds whole paragraphs, of 6.85 questions on average (SQuAD 2.0), and one per process or more.
  local paragraphs=$((($2 + 3) / 7)) own steps
  own=$(((2 * paragraphs + processes) / (2 * processes)))
  [ "$own" -gt 0 ] || own=1
  steps=$((($1 * 20 + 137 * own * processes - 1) / (137 * own * processes)))
  planned=(--per_device_train_batch_size $((7 * own)) --max_steps $steps --warmup_steps $((steps / 20 + 1)))
}

stage() { # STAGE.py FLAGS: in PROCESSES processes (default: one per GPU; two share the cores of a CPU)
  if [ "$processes" = 1 ]; then
    python "$@"  # which takes as many cores as are free
  else
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads} torchrun --nproc_per_node "$processes" "$@"
  fi
}
