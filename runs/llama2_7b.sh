#!/usr/bin/env bash
# Llama 2 7B chat, single-turn, on one 24 GB GPU: the untuned model, 10,000, 30,000 and 65,000 steps.
set -euo pipefail
cd "$(dirname "$0")/.."

config=configs/llama2_7b.yaml

evaluate() { python test_llama_squad.py --config $config --decoding free "$@"; }

[ -d data/squad_v2 ] || python create_squad_dataset.py --config $config
evaluate --output results/llama2_7b/base.csv

# Three runs, not one that is stopped twice: each has the learning-rate schedule of its own length.
for run in llama2_7b:10000 llama2_7b_30k:30000 llama2_7b_65k:65000; do
  out=results/${run%:*}
  [ -d "$out/final_merged_checkpoint" ] || python train_llama_squad.py --config $config \
    --max_steps "${run#*:}" --output_dir "$out" --resume_from_checkpoint auto
  evaluate --adapter_name="$out/final_checkpoints" --output "$out/results.csv"
done
# The original's pipeline divides a beam's log-probability by its length.
evaluate --adapter_name=results/llama2_7b_65k/final_checkpoints --num_beams 10 --length_penalty 1.0 \
  --output results/llama2_7b_65k/10_beams.csv

python summarize_results.py "Llama 2 7b chat (base model)=results/llama2_7b/base.csv" \
  "single-turn, 1.2 epochs=results/llama2_7b/results.csv" \
  "single-turn, 3.7 epochs=results/llama2_7b_30k/results.csv" \
  "single-turn, 8.0 epochs, 1 beam=results/llama2_7b_65k/results.csv" \
  "single-turn, 8.0 epochs, 10 beams=results/llama2_7b_65k/10_beams.csv"
