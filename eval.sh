#!/usr/bin/env bash
# Has the model forgotten anything? Runs lm-evaluation-harness on the base model and on the base
# with the adapter, and prints both side by side.
#
# Reads the adapter's folder; writes the harness's own files and comparison.md to --output_path.
set -euo pipefail

usage() {
    cat <<'USAGE'
Usage: ./eval.sh ADAPTER_FOLDER [options] [-- options of lm_eval run]

  --tasks NAMES         comma-separated tasks or groups (default: openllm, the Open LLM Leaderboard
                        v1; v2 is leaderboard, which needs pip install "lm_eval[math,ifeval]")
  --limit N             questions a task: a number, or a share of it (default: all)
  --include_path DIR    folder of your own YAML tasks
  --base MODEL          base model (default: the one that the adapter's configuration names)
  --quantize            hold the base in 4 bits (NF4); a 4-bit copy is saved in --output_path first
  --device DEVICE       cuda, cuda:1, cpu, mps (default: cuda if there is one, else cpu)
  --dtype DTYPE         type of the weights (default: the checkpoint's; float32 on a CPU)
  --batch_size N        a number or auto (default: auto; 8 on a CPU)
  --output_path DIR     folder of the results (default: results/lm_eval)

  PYTHON=...            the Python that has lm_eval (default: python)

Example, with the chat template:  ./eval.sh results/final_checkpoints -- --apply_chat_template
USAGE
}

fail() {
    echo "eval.sh: error: $1" >&2
    exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
adapter='' base='' tasks=openllm device='' dtype='' batch_size='' output=results/lm_eval quantize=''
options=()

while (($#)); do
    case $1 in
        -h | --help) usage && exit ;;
        --quantize) quantize=yes && shift && continue ;;
        --) shift && break ;;
        --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
        --*) (($# > 1)) || fail "$1: unknown flag, or one that needs a value (see --help)" ;;
        *)
            [[ -z $adapter ]] || fail "one adapter folder at a time, but found $adapter and $1"
            adapter=$1 && shift && continue
            ;;
    esac
    case $1 in
        --tasks) tasks=$2 ;;
        --base) base=$2 ;;
        --device) device=$2 ;;
        --dtype) dtype=$2 ;;
        --batch_size) batch_size=$2 ;;
        --output_path) output=$2 ;;
        --limit | --include_path) options+=("$1" "$2") ;;
        *) fail "unknown flag $1 (see --help)" ;;
    esac
    shift 2
done

[[ -n $adapter ]] || { usage >&2 && exit 2; }
[[ -f $adapter/adapter_config.json ]] || fail "$adapter holds no adapter_config.json: give the \
folder of an adapter, such as train_llama_squad.py writes to results/final_checkpoints"
command -v "$python" >/dev/null || fail "no $python here: set PYTHON to the one that has lm_eval"
"$python" -c 'import lm_eval' 2>/dev/null || fail "lm_eval is not installed for $python: \
$python -m pip install -r $root/requirements-eval.txt"

if [[ -z $base ]]; then
    base=$("$python" -c 'import json, sys
print(json.load(open(sys.argv[1]))["base_model_name_or_path"] or "")' \
        "$adapter/adapter_config.json") || fail "$adapter/adapter_config.json is damaged"
    [[ -n $base ]] || fail "$adapter names no base model: give it with --base"
    # A folder was relative to where the adapter was trained, most likely this repository.
    if [[ ! -d $base && -d $root/$base ]]; then base=$root/$base; fi
fi

if [[ -z $device ]]; then
    device=$("$python" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')
    if [[ $device == cpu ]]; then echo "No CUDA device: evaluating on the CPU." >&2; fi
fi
if [[ $device == cpu ]]; then
    dtype=${dtype:-float32} batch_size=${batch_size:-8}
fi
mkdir -p "$output"

model=$base
if [[ -n $quantize ]]; then
    # lm_eval's own load_in_4bit=True fails with transformers 5; a folder saved in 4 bits loads.
    model=$output/base-4bit
    "$python" - "$base" "$model" "$device" "${dtype:-auto}" <<'PY'
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

base, folder, device, dtype = sys.argv[1:]
quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
model = AutoModelForCausalLM.from_pretrained(
    base, quantization_config=quantization, device_map=device, dtype=dtype
)
model.save_pretrained(folder)
AutoTokenizer.from_pretrained(base).save_pretrained(folder)
PY
fi

# Both sides take the adapter's tokenizer, so that nothing but the weights differs.
tokenizer=$base
if [[ -f $adapter/tokenizer_config.json ]]; then tokenizer=$adapter; fi

evaluate() { # NAME [MODEL_ARG...]: run the harness, and leave its figures in NAME/results.json
    local folder=$output/$1 && shift
    mkdir -p "$folder"
    touch "$folder/.started"
    echo "Evaluating $folder ..." >&2
    # model_args are split at commas, so each is an argument of its own.
    "$python" -m lm_eval run --model hf --tasks "$tasks" --device "$device" \
        --batch_size "${batch_size:-auto}" --output_path "$folder" \
        --model_args "pretrained=$model" "tokenizer=$tokenizer" "dtype=${dtype:-auto}" "$@" \
        "${options[@]}" >&2
    rm -f "$folder/results.json"
    find "$folder" -name 'results_*.json' -newer "$folder/.started" \
        -exec cp {} "$folder/results.json" \;
    [[ -f $folder/results.json ]] || fail "lm_eval left no figures in $folder"
}

options+=("$@")
evaluate base
evaluate tuned "peft=$adapter"
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} "$python" - "$output/base/results.json" \
    "$output/tuned/results.json" <<'PY' | tee "$output/comparison.md"
import json
import sys

from llama_squad.report import render_comparison

base, tuned = (json.load(open(path, encoding="utf-8"))["results"] for path in sys.argv[1:])
print(render_comparison(base, tuned), end="")
PY
