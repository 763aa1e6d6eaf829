#!/usr/bin/env bash
# Llama 2 70B chat, untuned, in 4 bits on one 80 GB GPU. (configs/llama2_70b.yaml can train it, too.)
set -euo pipefail
cd "$(dirname "$0")/.."

config=configs/llama2_70b.yaml
out=results/llama2_70b

[ -d data/squad_v2 ] || python create_squad_dataset.py --config $config
python test_llama_squad.py --config $config --decoding free --output $out/base.csv
python summarize_results.py "Llama 2 70b chat (quantized)=$out/base.csv"
