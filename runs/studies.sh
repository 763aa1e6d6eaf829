#!/usr/bin/env bash
# One thing changed at a time: SmolLM2-135M-Instruct tuned in several ways, each asked the same questions
# of dev in whole paragraphs. The table ends with the paired differences to the first row. No GPU needed.
#
#   ./runs/studies.sh learning_curve    the base; 1,000 to 60,000 questions; all parameters on 20,000
#   ./runs/studies.sh rates             learning rates, questions a step
#   ./runs/studies.sh adapters          rank, adapted modules, where the adapter begins to act
#   ./runs/studies.sh prompts           the question before the context, or twice; no system text
#   ./runs/studies.sh reasoning         words of filler, pause tokens
#   ./runs/studies.sh precision         4 bits and unquantised, merged or not
#   ./runs/studies.sh beams             beams, of the base as well, and free replies
#
# QUESTIONS to train on (but for the curve's CURVE); ASKED of dev; MODEL and DATASET: folders in place of
# the Hub; DATA_FLAGS for create_squad_dataset.py, with which prompts and reasoning build datasets of their
# own; PROCESSES as for smollm2_135m.sh (rates: 2 at most). The same command resumes where it was stopped,
# and what studies share is trained and asked once, in results/studies/MODEL/QUESTIONS: run one at a time,
# and remove that for another recipe, DATASET or ASKED or another model of the same name, and data/studies for
# another DATASET. Figures: results_published/study_NAME_MODEL_QUESTIONS.json.
set -euo pipefail
cd "$(dirname "$0")/.."

study=$*
case $study in
  learning_curve | rates | adapters | prompts | reasoning | precision | beams) ;;
  *)
    echo "studies.sh: give one of the studies that its head names" >&2
    exit 2
    ;;
esac
config=configs/smollm2_135m.yaml
model=${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
dataset=${DATASET:-data/squad_v2}
questions=${QUESTIONS:-5000}
asked=${ASKED:-2000}
[ -d "$model" ] && name=$(cd "$model" && pwd -P) || name=$model
out=results/studies/${name##*/}
curve=${CURVE:-1000 5000 20000 60000}
numbers=$questions
[ "$study" != learning_curve ] || numbers=${curve// /_}
batch=28  # questions a step
rows=() label='' last=final_checkpoints  # what a training ends with
. runs/lib/stage.sh
for each in $curve; do number CURVE "$each"; done
if [ "$study" = rates ] && [ "$processes" -gt 2 ]; then  # each has a paragraph a step, at least: 7 questions
  echo "studies.sh: rates has steps of 14 questions: give PROCESSES=1 or 2" >&2
  exit 2
fi

train() { # NAME FLAGS
  plan "$questions" $batch
  [ -d "$out/$questions/$1/$last" ] ||
    stage train_llama_squad.py --config $config --model_name "$model" --dataset_name "$dataset" \
      --output_dir "$out/$questions/$1" --resume_from_checkpoint auto --eval_strategy no \
      "${planned[@]}" "${@:2}"
}

ask() { # NAME FLAGS
  stage test_llama_squad.py --config $config --model_name "$model" --dataset_name "$dataset" \
    --sample paragraphs --num_samples "$asked" --output "$out/$questions/$1.csv" "${@:2}"
  rows+=("${label:-$1}=$out/$questions/$1.csv")
}

tune() { # NAME FLAGS: train an adapter, and ask it
  train "$@"
  ask "$1" --adapter_name "$out/$questions/$1/final_checkpoints"
}

tune_on() { # NAME FLAGS: the same on a dataset that is built with other flags
  local dataset=data/studies/$1
  build "$dataset" "${@:2}"
  tune "$1"
}

ask_whole() { # NAME FOLDER: a model that is no adapter
  local model=$2
  ask "$1"
}

build "$dataset"
case $study in
  learning_curve)
    ask base
    for questions in $curve; do label="$questions questions" tune "recipe"; done
    questions=20000
    train "all parameters" --full_parameters --learning_rate 1e-4  # learns faster than with 5e-5
    ask_whole "all parameters" "$out/$questions/all parameters/final_checkpoints"
    ;;
  rates)
    tune "recipe"  # 8e-4
    for rate in 2e-4 4e-4 2e-3; do tune "rate $rate" --learning_rate $rate; done
    for batch in 56 14; do tune "$batch a step"; done
    ;;
  adapters)
    tune "recipe"
    tune "rank 8" --lora_r 8 --lora_alpha 16
    tune "rank 128" --lora_r 128 --lora_alpha 256
    tune "attention alone" --lora_target_modules q_proj k_proj v_proj o_proj
    tune "from the reply" --alora_from reply
    tune "from the question" --alora_from question
    tune "from the start" --alora_from start
    ;;
  prompts)
    tune "recipe"
    tune_on "question first" --prompt question_first
    tune_on "question twice" --prompt question_twice
    tune_on "no system text" --system_prompt ""
    ;;
  reasoning)
    tune "recipe"
    tune "filler 20" --filler 20
    tune "pause 1" --reasoning_tokens 1
    tune "pause 5" --reasoning_tokens 5
    tune_on "question twice" --prompt question_twice
    ;;
  precision) # activated adapters cannot be merged
    last=final_merged_checkpoint
    train "unquantised" --alora_from start --merge_and_push
    ask "unquantised" --adapter_name "$out/$questions/unquantised/final_checkpoints"
    ask_whole "unquantised, merged" "$out/$questions/unquantised/final_merged_checkpoint"
    train "4 bits" --alora_from start --merge_and_push --quantize
    ask "4 bits" --adapter_name "$out/$questions/4 bits/final_checkpoints" --quantize
    ask_whole "4 bits, merged" "$out/$questions/4 bits/final_merged_checkpoint"
    ;;
  beams)
    tune "recipe"  # 4 beams
    for beams in 1 10; do
      ask "$beams beams" --adapter_name "$out/$questions/recipe/final_checkpoints" --num_beams $beams
    done
    ask base
    for beams in 1 10; do ask "base, $beams beams" --num_beams $beams; done
    ask "free" --adapter_name "$out/$questions/recipe/final_checkpoints" --decoding free
    ;;
esac

python summarize_results.py "${rows[@]}" --paired
python summarize_results.py "${rows[@]}" --paired --format json \
  --output "results_published/study_${study}_${name##*/}_$numbers.json" > /dev/null
