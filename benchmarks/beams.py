"""How many beams span decoding needs: accuracy and seconds by --num_beams, on a real model.

Answers the questions of whole paragraphs, taken at random from a split, with each number of beams;
says how many answers are right (strictly, and by the official exact and F1), how often the best
span is the one that the most beams found, and the seconds that each took. The numbers of beams take
turns, a batch each, so that other work on the machine falls on all of them alike.

    python benchmarks/beams.py --model MODEL
    python benchmarks/beams.py --model MODEL --adapter DIR
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tuned_model import load_tuned

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from llama_squad.answers import extract_answer
from llama_squad.data import load_squad, sample_paragraphs
from llama_squad.decoding.kept import Kept
from llama_squad.evaluation import result_row
from llama_squad.metrics import score_predictions
from llama_squad.predictors.base import Prediction, batch_paragraphs
from llama_squad.predictors.local import LocalModel


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset_name", default="data/squad_v2", help="Dataset's folder.")
    parser.add_argument("--split", default="test")
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter")
    parser.add_argument("--num_samples", type=int, default=500, help="questions, about")
    parser.add_argument("--num_beams", type=int, nargs="+", default=[1, 2, 4, 10])
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--decoding", default="span")
    parser.add_argument("--dtype", default="auto", help="type of the weights, as for the stages")
    return parser.parse_args()


def official(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Return the official scores of some answers."""
    golds = {p.record["id"]: p.record["answers"]["text"] for p in predictions}
    texts = {p.record["id"]: extract_answer(p.reply.completion).official for p in predictions}
    return score_predictions(golds, texts)


def report(found: dict[int, list[Prediction]], seconds: dict[int, float]) -> None:
    """Print a row for each number of beams."""
    widest = found[max(found)]
    print(f"\n{'beams':>5}{'% strict':>10}{'% exact':>9}{'% F1':>7}{'% F1 HasAns':>13}"
          f"{'best as widest':>16}{'seconds':>9}")  # fmt: skip
    for beams, predictions in found.items():
        strict = sum(result_row(prediction)["Exact match"] for prediction in predictions)
        scores = official(predictions)
        same = sum(
            getattr(a.reply.best, "text", "") == getattr(b.reply.best, "text", "")
            for a, b in zip(predictions, widest, strict=True)
        )
        print(
            f"{beams:5}{100 * strict / len(predictions):10.2f}{scores['exact']:9.2f}"
            f"{scores['f1']:7.2f}{scores.get('HasAns_f1', 0):13.2f}"
            f"{f'{same}/{len(predictions)}':>16}{seconds[beams]:9.1f}",
            flush=True,
        )


def main() -> None:
    """Run the benchmark."""
    args = parse()
    weights, encoder, prompt = load_tuned(args.model, args.adapter, args.dtype)
    split = load_squad(args.dataset_name)[args.split]
    records = list(sample_paragraphs(split, args.num_samples, seed=0))
    kept = Kept(weights)
    models = {
        beams: LocalModel(
            weights, encoder, decoding=args.decoding, num_beams=beams, kept=kept, **prompt
        )
        for beams in args.num_beams
    }
    found: dict[int, list[Prediction]] = {beams: [] for beams in models}
    seconds = dict.fromkeys(models, 0.0)
    batches = list(batch_paragraphs(records, args.batch_size))
    for number, batch in enumerate(tqdm(batches, mininterval=30)):
        for beams, model in models.items():
            start = time.perf_counter()
            found[beams] += model.answer(batch)
            seconds[beams] += time.perf_counter() - start
        if number % 4 == 3 and number + 1 < len(batches):  # a long run tells how it goes
            report(found, seconds)
    paragraphs = len({record["context"] for record in records})
    print(f"{len(records)} questions of {paragraphs} paragraphs")
    report(found, seconds)


if __name__ == "__main__":
    main()
