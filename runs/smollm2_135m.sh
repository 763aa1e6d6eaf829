#!/usr/bin/env bash
# SmolLM2-135M-Instruct, untuned and tuned on 40,000 questions, by span decoding with 4, 1 and 10 beams and free, and
# with a threshold tuned on val.
# No GPU needed. The same command resumes where it was stopped.
#
#   ./runs/smollm2_135m.sh
#   MODEL=DIR DATA_FLAGS="--train_files train-*.json --test_files dev.json" ./runs/smollm2_135m.sh   # without the Hub
#   SAMPLE="--num_samples 2000 --sample paragraphs" ./runs/smollm2_135m.sh   # a sixth of the answers
#   QUESTIONS=20000 ./runs/smollm2_135m.sh   # fewer or more to train on, in results/smollm2_135m_20000
#
# PROCESSES=N: how many share the work (default: one per GPU; without a GPU two, which share the cores).
set -euo pipefail
cd "$(dirname "$0")/.."

config=configs/smollm2_135m.yaml
base=results/smollm2_135m
questions=${QUESTIONS:-40000}
out=${base}_$questions
read -ra sample <<< "${SAMPLE:-}"
. runs/lib/stage.sh
flags=(--config $config ${MODEL:+"--model_name=$MODEL"})

evaluate() { stage test_llama_squad.py "${flags[@]}" ${sample[@]+"${sample[@]}"} "$@"; }
tuned=--adapter_name=$out/final_checkpoints
plan "$questions" 28

echo "Two cores with AMX (Intel Xeon) take, by what was measured (benchmarks/RESULTS.md): an evaluation by span decoding" \
  "15 minutes, training on 40,000 questions 95, on 20,000 half of that. So a first table stands after two hours (20,000 questions:" \
  "80 minutes). The rows after it take some three and a half more: the untuned model's free replies, which are long, 65 minutes," \
  "10 beams 20 to 30 each, a threshold, which is tuned on val, 25." \
  "CPUs with AVX512-BF16 alone take as long (AMD Zen 5; 105 minutes for those free replies) or one and a half times as long (Zen 4), by what they" \
  "did with an adapter that acts from the question on, whose steps take about three quarters of the time;" \
  "others compute in float32: training takes four to six times as long there as with AMX."
build data/squad_v2
evaluate --output $base/base_spans.csv
[ -d $out/final_checkpoints ] ||
  stage train_llama_squad.py "${flags[@]}" --output_dir "$out" --resume_from_checkpoint auto \
    "${planned[@]}"
evaluate $tuned --na_prob_thresh 0.5 --output $out/tuned_spans.csv  # not the one kept with the adapter
python summarize_results.py "base, span decoding=$base/base_spans.csv" "tuned, span decoding=$out/tuned_spans.csv"
evaluate $tuned --decoding free --output $out/tuned_free.csv
evaluate $tuned --tune_threshold --output $out/tuned_threshold.csv
for beams in 1 10; do
  evaluate $tuned --num_beams $beams --na_prob_thresh 0.5 --output $out/tuned_spans_${beams}_beams.csv
  evaluate --num_beams $beams --output $base/base_spans_${beams}_beams.csv
done
evaluate --decoding free --batch_size 128 --output $base/base_free.csv

python summarize_results.py "base, free=$base/base_free.csv" "base, span decoding=$base/base_spans.csv" \
  "base, 1 beam=$base/base_spans_1_beams.csv" "base, 10 beams=$base/base_spans_10_beams.csv" \
  "tuned, free=$out/tuned_free.csv" "tuned, span decoding=$out/tuned_spans.csv" \
  "tuned, 1 beam=$out/tuned_spans_1_beams.csv" "tuned, 10 beams=$out/tuned_spans_10_beams.csv" \
  "tuned, threshold tuned on val=$out/tuned_threshold.csv"
