"""What makes a real model faster on a CPU, each against its absence: the same work, in turns.

Training: a step's rows of real paragraphs, forward and backward, with attention over the whole row
and in blocks (``llama_squad/attention.py``). Evaluation: whole paragraphs answered in batches, with
neither finished rows dropped nor tokens run ahead (``decoding/lookahead.py``), then with one, and
with both. Every way takes its turn in each round, so that other work on the machine falls on all
alike; what is printed is the median of the rounds, in seconds of processor time, and how many
answers differ.

    python benchmarks/cpu_speed.py --model MODEL --adapter DIR
"""

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from llama_squad import attention, modeling
from llama_squad.arguments import ModelArguments, TrainArguments
from llama_squad.data import load_squad, sample_paragraphs
from llama_squad.decoding import batch, lookahead
from llama_squad.predictors.base import batch_paragraphs
from llama_squad.predictors.local import LocalModel

NEVER = 10**9


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", help="of evaluation; training begins with a fresh one")
    parser.add_argument("--dataset_name", default="data/squad_v2", help="Dataset's folder.")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--paragraphs", type=int, default=7, help="of a training step")
    parser.add_argument("--questions", type=int, default=60, help="to answer, about")
    parser.add_argument("--num_beams", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def take_turns(ways: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, float], dict]:
    """Run all ways once a round, after one that counts for nothing; return medians and results."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, Any] = {}
    for _ in range(rounds + 1):
        for name, run in ways.items():
            start = time.process_time()
            results[name] = run()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}, results


def report(title: str, seconds: dict[str, float], results: dict[str, str]) -> None:
    """Print a table, each way against the first."""
    print(f"\n{title}\n")
    first = next(iter(seconds.values()))
    for name, taken in seconds.items():
        print(f"{name:44} {taken:8.2f} s   {first / taken:5.2f} times   {results[name]}")


def training(args: argparse.Namespace, settings: ModelArguments, dataset: Any) -> None:
    """Time a training step."""
    from llama_squad.training.setup import prepare_model
    from llama_squad.training.trainer import answer_loss
    from llama_squad.tree import Tree, batch_rows

    encoder = modeling.load_encoder(settings)
    records = sample_paragraphs(dataset["train"], args.paragraphs * 8, 1).to_list()
    groups: dict[str, list[Any]] = {}
    for record in records:
        groups.setdefault(record["context"], []).append(record["messages"])
    tree = Tree.build([encoder.encode(found) for found in [*groups.values()][: args.paragraphs]])
    lora = TrainArguments(quantize=False, lora_r=32, lora_alpha=64, lora_dropout=0.0)
    model = prepare_model(lora, settings, encoder).train()

    def step(block_tokens: int) -> float:
        model.zero_grad()
        with mock.patch.object(attention, "BLOCK_TOKENS", block_tokens):
            loss, _, count = answer_loss(model, batch_rows([tree], 0))
            (loss / count).backward()
        return loss.item() / int(count)

    ways = {
        "attention over the whole row": lambda: step(NEVER),
        "attention in blocks": lambda: step(attention.BLOCK_TOKENS),
    }
    seconds, losses = take_turns(ways, args.rounds)
    title = f"A step of {len(tree.leaves)} questions, {len(tree.input_ids):,} tokens"
    report(title, seconds, {name: f"loss {loss:.5f}" for name, loss in losses.items()})


@contextlib.contextmanager
def without(*parts: str) -> Iterator[None]:
    """Switch parts of decoding off."""
    with contextlib.ExitStack() as stack:
        if "lookahead" in parts:
            stack.enter_context(mock.patch.object(lookahead, "PASS_TOKENS", 0))
        if "rows" in parts:
            stack.enter_context(mock.patch.object(batch, "KEPT_ROWS", -1.0))
        yield


def evaluation(args: argparse.Namespace, settings: ModelArguments, dataset: Any) -> None:
    """Time span decoding."""
    encoder = modeling.load_encoder(settings)
    model = modeling.load_model(settings, adapter_name=args.adapter).eval()
    local = LocalModel(model, encoder, num_beams=args.num_beams)
    questions = sample_paragraphs(dataset["test"], args.questions, 1).to_list()

    def answer(*parts: str) -> list[str]:
        with without(*parts):
            return [
                prediction.reply.completion
                for part in batch_paragraphs(questions, args.batch_size)
                for prediction in local.answer(part)
            ]

    ways = {
        "neither": lambda: answer("lookahead", "rows"),
        "finished rows dropped": lambda: answer("lookahead"),
        "and tokens run ahead": answer,
    }
    seconds, answers = take_turns(ways, args.rounds)
    first = answers["neither"]
    notes = {
        name: f"{seconds[name] / len(first):.3f} s per question, "
        f"{sum(a != b for a, b in zip(first, found, strict=True))} answers differ"
        for name, found in answers.items()
    }
    report(f"{len(first)} questions, {args.num_beams} beams", seconds, notes)


def main() -> None:
    """Measure both."""
    args = parse()
    settings = ModelArguments(model_name=args.model, dtype=args.dtype)
    print(
        f"{args.model}, {modeling.weights_dtype(settings)}, {torch.get_num_threads()} threads, "
        f"{args.rounds} rounds"
    )
    dataset = load_squad(args.dataset_name)
    training(args, settings, dataset)
    evaluation(args, settings, dataset)


if __name__ == "__main__":
    main()
