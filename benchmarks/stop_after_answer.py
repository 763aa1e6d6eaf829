"""What ``--stop_after_answer`` saves, and that the table's columns stay: real replies, both ways.

Whole paragraphs of the test split are answered freely, with one beam, with and without it.

    python benchmarks/stop_after_answer.py --model MODEL --adapter DIR --questions 100
"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tuned_model import load_tuned

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from llama_squad.answers import extract_answer
from llama_squad.data import load_squad, sample_paragraphs
from llama_squad.metrics import Outcome, strict_counts, strict_outcome
from llama_squad.predictors.base import Prediction, batch_paragraphs
from llama_squad.predictors.local import LocalModel


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter")
    parser.add_argument("--dataset_name", default="data/squad_v2", help="Dataset's folder.")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=32)
    return parser.parse_args()


def main() -> None:
    """Answer both ways and compare."""
    args = parse()
    model, encoder, prompt = load_tuned(args.model, args.adapter, args.dtype)
    split = load_squad(args.dataset_name)["test"]
    records = sample_paragraphs(split, args.questions, 1).to_list()
    found: dict[bool, list[Prediction]] = {}
    for stop in (False, True):
        local = LocalModel(
            model, encoder, decoding="free", max_new_tokens=args.max_new_tokens,
            stop_after_answer=stop, **prompt,
        )  # fmt: skip
        start = time.process_time()
        batches = batch_paragraphs(records, args.batch_size)
        found[stop] = [one for batch in batches for one in local.answer(batch)]
        seconds = time.process_time() - start
        tokens = sum(len(one.reply.token_ids) for one in found[stop])
        print(
            f"stop_after_answer {stop!s:5}: {tokens:7,} tokens, {seconds:6.0f} s; "
            + columns(found[stop]), flush=True,
        )  # fmt: skip
    pairs = list(zip(found[False], found[True], strict=True))
    same = sum(a.reply.completion.startswith(b.reply.completion) for a, b in pairs)
    answers = sum(read(a) == read(b) for a, b in pairs)
    print(
        f"{model.dtype}, {len(pairs)} questions: {same} replies are the beginning of what they "
        f"would be, {answers} read the same"
    )


def read(prediction: Prediction) -> Any:
    """Return what a reply says."""
    return extract_answer(prediction.reply.completion)


def columns(predictions: list[Prediction]) -> str:
    """Return the strict columns, as counts."""
    outcomes = Counter[Outcome](
        strict_outcome(read(one), one.record["answers"]["text"]) for one in predictions
    )
    return ", ".join(f"{name} {n}/{of}" for name, (n, of) in strict_counts(outcomes).items())


if __name__ == "__main__":
    main()
