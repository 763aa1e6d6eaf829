"""What makes a real model faster on a CPU, each against its absence: the same work, in turns.

Training: a step's row of real paragraphs, forward and backward, of an adapter that acts from the
question on, or from where ``--alora_from`` says: attention over the whole row, in blocks, by
explicit matrix products (``llama_squad/attention.py``), those of the scores on a CPU's units for
bfloat16 (``products.py``), the base's tokens first (``llama_squad/supervised.py``), LoRA's layers
as one autograd function (``llama_squad/lora.py``), and cross entropy a few tokens at a time.
Evaluation: whole paragraphs answered in batches, and some questions by themselves, without all of
the following, then with one more each: finished rows dropped, tokens run ahead
(``decoding/lookahead.py``), the adapter without PEFT's detours (``decoding/layers.py``), the output
layer's weights kept for a CPU's units (``head.py``), attention that copies no keys, and by
explicit matrix products, weights packed once (``products.py``), and what all prompts begin with run
once, and of questions by themselves, three of each context in turn, the context (``decoding/
kept.py``). Every way takes its turn in each round, so that other work on the
machine falls on all alike; what is printed is the median of the rounds, in seconds of CPU time, and
how many answers differ.

    python benchmarks/cpu_speed.py --model MODEL --adapter DIR
"""

import argparse
import contextlib
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from tuned_model import load_tuned

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from llama_squad import attention, head, lora, modeling, supervised
from llama_squad.arguments import ModelArguments, TrainArguments
from llama_squad.data import load_squad, sample_paragraphs
from llama_squad.decoding import batch, layers, lookahead
from llama_squad.predictors.base import batch_paragraphs
from llama_squad.predictors.local import LocalModel
from llama_squad.prompts import adapter_start


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", help="of evaluation; training begins with a fresh one")
    parser.add_argument("--dataset_name", default="data/squad_v2", help="Dataset's folder.")
    parser.add_argument("--dtype", default="auto")
    acts_from = ("context", "question", "reply")
    parser.add_argument("--alora_from", default="question", choices=acts_from)
    parser.add_argument("--bf16", action="store_true", help="of training: its products in bfloat16")
    parser.add_argument("--paragraphs", type=int, default=7, help="of a training step")
    parser.add_argument("--questions", type=int, default=60, help="to answer, about; 0: none")
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
        place = adapter_start(record["messages"], record, "single_turn", args.alora_from)
        groups.setdefault(record["context"], []).append((record["messages"], place))
    found = [[*zip(*group, strict=True)] for group in [*groups.values()][: args.paragraphs]]
    tree = Tree.build([encoder.encode(messages, places) for messages, places in found])
    lora = TrainArguments(
        quantize=False, lora_r=32, lora_alpha=64, lora_dropout=0.0, alora_from=args.alora_from
    )
    model = prepare_model(lora, settings, encoder).train()

    def step(*parts: str) -> float:
        model.zero_grad()
        # as --bf16 has it
        with without(*parts), torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss, _, count = answer_loss(model, batch_rows([tree], 0))
        (loss / count).backward()
        return loss.item() / int(count)

    new = "one step", "loss"
    ways = {
        "torch's attention over the whole row": lambda: step("blocks", "base first", *new),
        "in blocks": lambda: step("products", "base first", *new),
        "by explicit matrix products": lambda: step("scores", "base first", *new),
        "their sums in float32, factors in bfloat16": lambda: step("base first", *new),
        "the base's tokens first": lambda: step(*new),
        "LoRA's layers as one autograd function": lambda: step("loss"),
        "cross entropy in parts": step,
    }
    seconds, losses = take_turns(ways, args.rounds)
    title = f"A step of {len(tree.leaves)} questions, {len(tree.input_ids):,} tokens"
    report(title, seconds, {name: f"loss {loss:.5f}" for name, loss in losses.items()})


def torchs_own(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: Any, scaling: float | None
) -> torch.Tensor:
    """Run torch's attention in the place of our products."""
    parts = [
        F.scaled_dot_product_attention(
            query[:, :, rows],
            key[:, :, keys],
            value[:, :, keys],
            attn_mask=mask,
            scale=scaling,
            enable_gqa=True,
        )
        for rows, keys, mask in blocks
    ]
    return torch.cat(parts, 2).transpose(1, 2)


def plain_loss(
    logits: torch.Tensor, wanted: torch.Tensor, smoothing: float, weights: None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run torch's cross entropy in the place of ours."""
    loss = F.cross_entropy(logits.float(), wanted, reduction="sum", label_smoothing=smoothing)
    return loss, (logits.float().argmax(-1) == wanted).sum()


def plain_attention(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Run transformers' attention in the place of ours."""
    return sdpa_attention_forward(*args, **kwargs)[0]


PARTS: dict[str, tuple[Any, str, Any]] = {
    "blocks": (attention, "BLOCK_TOKENS", 10**9),
    "products": (attention.Products, "apply", torchs_own),
    "one step": (lora, "is_plain", lambda *_: False),
    "loss": (supervised.CrossEntropy, "apply", plain_loss),
    "scores": (attention, "sums_in_float32", lambda _: contextlib.nullcontext()),
    "base first": (supervised, "runs_base_first", lambda *_: False),
    "rows": (batch, "KEPT_ROWS", -1.0),
    "lookahead": (lookahead, "PASS_TOKENS", 0),
    "adapter": (layers, "plain_adapter", lambda _: None),
    "head": (head, "_is_kept", lambda _: False),
    "attention": (attention, "_sdpa", plain_attention),
    "explicit": (attention, "_by_products", lambda _: False),
    "packed": (layers, "is_packable", lambda _: False),
    "prefix": (LocalModel, "_prefix", []),
    "contexts": (batch, "LONGEST_KEPT", 0),
}
"""What is switched off, each by what takes the place of what."""


@contextlib.contextmanager
def without(*parts: str) -> Iterator[None]:
    """Switch parts of training and of decoding off."""
    with contextlib.ExitStack() as stack:
        for part in parts:
            stack.enter_context(mock.patch.object(*PARTS[part]))
        yield


def evaluation(args: argparse.Namespace, dataset: Any) -> None:
    """Time span decoding: of paragraphs, and of some of their questions alone."""
    model, encoder, prompt = load_tuned(args.model, args.adapter, args.dtype)
    questions = sample_paragraphs(dataset["test"], args.questions, 1).to_list()
    together = list(batch_paragraphs(questions, args.batch_size))
    alone = [[[record]] for part in together for group in part for record in group[:3]]
    made: dict[tuple[str, ...], LocalModel] = {}

    def answer(batches: Sequence[Any], *parts: str) -> list[str]:
        with without(*parts):
            if parts not in made:  # what each keeps is its own
                made[parts] = LocalModel(
                    model, encoder, num_beams=args.num_beams, keep_contexts=True, **prompt
                )
            found = [prediction for part in batches for prediction in made[parts].answer(part)]
        return [prediction.reply.completion for prediction in found]

    added = {
        "none of it": "rows",
        "finished rows dropped": "lookahead",
        "tokens run ahead": "adapter",
        "the adapter without PEFT's detours": "head",
        "the output layer's weights kept": "attention",
        "attention without copies": "explicit",
        "attention by explicit products": "packed",
        "weights packed once": "prefix",
        "what all prompts begin with run once": "contexts",
        "a context kept for its next question": "",
    }
    lacking = list(added.values())
    batches: Sequence[Any]
    for title, batches in (("by paragraph", together), ("one at a time", alone)):
        ways: dict[str, Callable[[], Any]] = {
            name: functools.partial(answer, batches, *filter(None, lacking[index:]))
            for index, name in enumerate(added)
        }
        seconds, answers = take_turns(ways, args.rounds)
        first = answers["none of it"]
        notes = {
            name: f"{seconds[name] / len(first):.3f} s per question, "
            f"{sum(a != b for a, b in zip(first, found, strict=True))} answers differ"
            for name, found in answers.items()
        }
        report(f"{len(first)} questions {title}, {args.num_beams} beams", seconds, notes)


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
    if args.questions:
        evaluation(args, dataset)


if __name__ == "__main__":
    main()
