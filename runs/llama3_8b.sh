#!/usr/bin/env bash
# Llama 3 8B instruct, untuned and tuned, on one 24 GB GPU.
set -euo pipefail
cd "$(dirname "$0")/.."

config=configs/llama3_8b.yaml
out=results/llama3_8b

[ -d data/squad_v2 ] || python create_squad_dataset.py --config $config
python test_llama_squad.py --config $config --decoding free --output $out/base.csv
[ -d $out/final_merged_checkpoint ] ||
  python train_llama_squad.py --config $config --resume_from_checkpoint auto
python test_llama_squad.py --config $config --decoding free --adapter_name=$out/final_checkpoints
python summarize_results.py "Llama 3 8b instruct (base model)=$out/base.csv" \
  "single-turn, 1.2 epochs=$out/results.csv"
