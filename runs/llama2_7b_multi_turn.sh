#!/usr/bin/env bash
# Llama 2 7B chat with the task in three user turns, on one 24 GB GPU; 1,000 random questions, as in the original.
set -euo pipefail
cd "$(dirname "$0")/.."

config=configs/multi_turn.yaml
out=results/multi_turn

[ -d data/squad_v2_multi_turn ] || python create_squad_dataset.py --config $config
[ -d $out/final_checkpoints ] ||
  python train_llama_squad.py --config $config --resume_from_checkpoint auto
python test_llama_squad.py --config $config --adapter_name=$out/final_checkpoints --decoding free \
  --num_samples 1000 --shuffle
python summarize_results.py "multi-turn, 1.2 epochs=$out/results.csv"
