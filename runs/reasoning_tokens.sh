#!/usr/bin/env bash
# Llama 3 8B instruct with 20 pause tokens before the answer, on one 24 GB GPU.
set -euo pipefail
cd "$(dirname "$0")/.."

config=configs/reasoning_tokens.yaml
out=results/reasoning_tokens

[ -d data/squad_v2 ] || python create_squad_dataset.py --config $config
[ -d $out/final_checkpoints ] ||
  python train_llama_squad.py --config $config --resume_from_checkpoint auto
python test_llama_squad.py --config $config --decoding free --adapter_name=$out/final_checkpoints
python summarize_results.py "20 pause tokens=$out/results.csv"
