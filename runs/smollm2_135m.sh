#!/usr/bin/env bash
# SmolLM2-135M-Instruct, untuned and tuned on 20,000 questions, free and held to spans. No GPU needed.
set -euo pipefail
cd "$(dirname "$0")/.."

config=configs/smollm2_135m.yaml
out=results/smollm2_135m

evaluate() { python test_llama_squad.py --config $config "$@"; }

[ -d data/squad_v2 ] || python create_squad_dataset.py --config $config
evaluate --decoding free --output $out/base_free.csv
evaluate --output $out/base_spans.csv
[ -d $out/final_checkpoints ] ||
  python train_llama_squad.py --config $config --resume_from_checkpoint auto
evaluate --decoding free --adapter_name=$out/final_checkpoints --output $out/tuned_free.csv
evaluate --adapter_name=$out/final_checkpoints --output $out/tuned_spans.csv

python summarize_results.py "base, free=$out/base_free.csv" "base, spans=$out/base_spans.csv" \
  "tuned, free=$out/tuned_free.csv" "tuned, spans=$out/tuned_spans.csv"
