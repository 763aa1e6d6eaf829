#!/usr/bin/env bash
# The original's rows that need no training: OpenAI's models (OPENAI_API_KEY; it costs) and DeBERTa.
set -euo pipefail
cd "$(dirname "$0")/.."

[ -d data/squad_v2 ] || python create_squad_dataset.py

python test_llama_squad.py --predictor encoder --model_name deepset/deberta-v3-large-squad2 \
  --output results/deberta.csv
tables=("deepset/deberta-v3-large-squad2=results/deberta.csv")
if [ -n "${OPENAI_API_KEY:-}" ]; then
  for model in gpt-3.5-turbo gpt-4; do
    python test_llama_squad.py --predictor server --model_name $model --num_samples 1000 --shuffle \
      --output results/$model.csv
    tables+=("OpenAI $model=results/$model.csv")
  done
else
  echo "others.sh: OPENAI_API_KEY is not set: OpenAI's rows are left out" >&2
fi
python summarize_results.py "${tables[@]}"
