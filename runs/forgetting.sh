#!/usr/bin/env bash
# Task gained against chat kept: SmolLM2-135M-Instruct tuned in twelve ways, each on the same number
# of questions; then what each has learned and forgotten, as figures and as a picture. No GPU needed;
# one process. DATA_FLAGS: for create_squad_dataset.py.
#
#   ./runs/forgetting.sh
#   MODEL=DIR DATASET=DIR QUESTIONS=2000 DATA=DIR EVAL_PYTHON=python ./runs/forgetting.sh
#
# DATA holds the prompts of MT-Bench and IFEval, WikiText-2 and the benchmarks' tasks; EVAL_PYTHON
# names the Python that has lm_eval (without it the benchmarks are left out): see docs/stages.md. The
# figures go to OUTPUT (results_published/forgetting.json), which must be a new file for other
# settings, adapters and the picture to results/forgetting/MODEL/QUESTIONS: remove that for another
# DATASET or another model of the same name. The same command resumes where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."

config=configs/smollm2_135m.yaml
model=${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
dataset=${DATASET:-data/squad_v2}
questions=${QUESTIONS:-2000}
asked=${ASKED:-2000}  # dev questions that each adapter answers
[ -d "$model" ] && name=$(cd "$model" && pwd -P) || name=$model
out=results/forgetting/${name##*/}/$questions
data=${DATA:-../shared/data/benchmarks}
adapters=()

[ -d "$data" ] || {
  echo "forgetting.sh: no folder $data: set DATA (docs/stages.md says what it holds)" >&2
  exit 1
}
PROCESSES=1 . runs/lib/stage.sh
plan "$questions" 28
# 4 paragraphs hold 27.4 questions; where a tenth is chat, 6 paragraphs or chats hold 23.4 of SQuAD's
chat_steps=$(((questions * 10 + 233) / 234))

tune() {
  local name=$1
  shift
  [ -d "$out/$name/final_checkpoints" ] ||
    stage train_llama_squad.py --config $config --model_name "$model" --dataset_name "$dataset" \
      --output_dir "$out/$name" --resume_from_checkpoint auto "${planned[@]}" --eval_strategy no \
      --alora_from start "$@"
  adapters+=(--adapter "$name=$out/$name/final_checkpoints")
}

build "$dataset"

tune "8e-4, from the context" --learning_rate 8e-4 --alora_from context
tune "8e-4, from the question" --learning_rate 8e-4 --alora_from question
tune "8e-4, from the reply" --learning_rate 8e-4 --alora_from reply
tune "8e-4" --learning_rate 8e-4
tune "2e-4" --learning_rate 2e-4
tune "2e-5" --learning_rate 2e-5
tune "2e-6" --learning_rate 2e-6
tune "2e-7" --learning_rate 2e-7
tune "8e-4, chat" --learning_rate 8e-4 --chat_share 0.1 --max_steps $chat_steps
tune "8e-4, chat, KL" --learning_rate 8e-4 --chat_share 0.1 --chat_kl 1 --max_steps $chat_steps
tune "8e-4, loss on all" --learning_rate 8e-4 --loss_on all
tune "2e-4, loss on all" --learning_rate 2e-4 --loss_on all

python benchmarks/forgetting.py --base "$model" --dataset_name "$dataset" --questions "$asked" \
  --work "$out" --data "$data" "${adapters[@]}" ${OUTPUT:+--output "$OUTPUT"} \
  ${EVAL_PYTHON:+--eval_python "$EVAL_PYTHON"} --plot "$out/forgetting.svg"
