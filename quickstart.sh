#!/usr/bin/env bash
# The whole pipeline on a CPU, from nothing to the results table: a virtual environment, a small
# world of questions, a tiny Llama tuned with LoRA, base and tuned evaluated side by side.
#
#   ./quickstart.sh
set -euo pipefail
cd "$(dirname "$0")"
# shellcheck source=quickstart/venv.sh
. quickstart/venv.sh
trap 'echo "quickstart.sh: interrupted: the same command goes on with the installation." >&2; exit 130' INT
set_up_venv requirements.txt
trap 'exit 130' INT # the stage has said what is kept

config=configs/quickstart.yaml
out=results/quickstart
started=$SECONDS
step() { printf '\n\033[1m%s\033[0m\n' "$*"; "$@"; }

step python create_squad_dataset.py --config $config
step python train_llama_squad.py --config $config
step python test_llama_squad.py --config $config --decoding free --output $out/base.csv --overwrite
step python test_llama_squad.py --config $config --decoding free --output $out/tuned.csv --overwrite \
  --adapter_name=$out/final_checkpoints
step python test_llama_squad.py --config $config --output $out/tuned_spans.csv --overwrite \
  --adapter_name=$out/final_checkpoints --num_beams 4
step python summarize_results.py "base model=$out/base.csv" "tuned=$out/tuned.csv" \
  "tuned, span decoding=$out/tuned_spans.csv"

cat <<TXT

The base model reads and chats, but knows nothing of the format. $((SECONDS - started)) seconds of
fine-tuning and evaluation later it answers with the exact words of the context, or abstains.

Next, to try:
  . .venv/bin/activate
  python app.py --config $config --adapter_name=$out/final_checkpoints     # chat with it
  python train_llama_squad.py --config $config --show_mask 3               # what is trained
  python summarize_results.py $out/tuned_spans.csv --plot results/plots    # how sure it is
and with a GPU and a real model:
  python create_squad_dataset.py
  python train_llama_squad.py --config configs/activated.yaml --resume_from_checkpoint auto
  python test_llama_squad.py --config configs/activated.yaml --adapter_name=results/activated/final_checkpoints
  python summarize_results.py results/activated/results.csv
TXT
