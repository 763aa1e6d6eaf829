#!/usr/bin/env bash
# Does it carry over? Dev beside SQuADShifts (new Wikipedia articles, Reddit), XQuAD in English, and
# Disfl-QA: dev's questions as people say them, beside the same ones as SQuAD has them.
#   ./runs/carry_over.sh                                 the base model
#   ./runs/carry_over.sh results/smollm2_135m_40000/final_checkpoints
# QUESTIONS of each in whole paragraphs; CONFIG for another model; NAME for the names of the results.
# Files that data/carry_over/ lacks are fetched, but for SQuAD2-CR's reason_gold_test.tsv
# (https://aclanthology.org/2020.lrec-1.667): with it, abstentions are counted by why there is no answer.
set -euo pipefail
cd "$(dirname "$0")/.."

adapter=${1:-}
config=${CONFIG:-configs/smollm2_135m.yaml}
questions=${QUESTIONS:-2000}
of_adapter() { # the folder that its training was given, or the name on the Hub
  local path=${1//\//_}
  [ ! -d "$1" ] || path=$(cd "$1" && pwd -P)
  case $path in
    */final_checkpoints) path=${path%/*} ;;
    */final_merged_checkpoint) path=${path%/*}_merged ;;
    */checkpoint-*) path=${path%/*}_${path##*/} ;;
  esac
  echo "${path##*/}"
}
name=${NAME:-$([ -z "$adapter" ] && echo base || of_adapter "$adapter")}
files=data/carry_over
out=results/carry_over_$name

fetch() { # FILE ADDRESS
  [ -f "$files/$1" ] && return
  curl -fsSL --create-dirs -o "$files/$1.part" "$2" || {
    echo "carry_over.sh: could not fetch $2: put that file at $files/$1 yourself" >&2
    exit 1
  }
  mv "$files/$1.part" "$files/$1"
}
github=https://raw.githubusercontent.com
fetch dev-v2.0.json https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json
for part in new_wiki reddit; do
  fetch ${part}_v1.0.json $github/modestyachts/squadshifts-website/master/datasets/${part}_v1.0.json
done
fetch xquad.en.json $github/google-deepmind/xquad/master/xquad.en.json
for part in dev test; do
  fetch disfl_qa_$part.json $github/google-research-datasets/Disfl-QA/main/$part.json
done
python benchmarks/disfl_qa.py --squad $files/dev-v2.0.json --output_dir $files \
  --disfl_qa $files/disfl_qa_dev.json $files/disfl_qa_test.json

tables=()
evaluate() { # NAME FILE
  [ -d "$files/$1" ] || python create_squad_dataset.py --config "$config" --test_files "$files/$2" \
    --dataset_name "$files/$1"
  python test_llama_squad.py --config "$config" ${adapter:+--adapter_name="$adapter"} \
    --dataset_name "$files/$1" --sample paragraphs --num_samples "$questions" --na_prob_thresh 0.5 \
    --output "$out/$1.csv"  # not the one kept with the adapter
  tables+=("$1=$out/$1.csv")
}
evaluate dev dev-v2.0.json
evaluate new_wiki new_wiki_v1.0.json
evaluate reddit reddit_v1.0.json
evaluate xquad_en xquad.en.json
evaluate plain plain.json
evaluate disfluent disfluent.json

python summarize_results.py "${tables[@]}"
python summarize_results.py "${tables[@]}" --format json \
  --output "results_published/carry_over_$name.json" > /dev/null
if [ -f $files/reason_gold_test.tsv ]; then
  python benchmarks/abstentions.py "$out/dev.csv" $files/reason_gold_test.tsv \
    --json "results_published/abstentions_$name.json"
fi
