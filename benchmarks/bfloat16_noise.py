"""How far answers in bfloat16 depend on the batch size: the same questions, several sizes compared.

Answers the questions of whole paragraphs, taken at random from a split, with each batch size, and
says for each pair of neighbouring sizes, and for all sizes together, how many answers and best
spans differ, and how far log P("?") and log P(best span) do. What is compared is kept in ``--out``.

    python benchmarks/bfloat16_noise.py --model MODEL
    python benchmarks/bfloat16_noise.py --model MODEL \
        --emulate --num_samples 100

Processors without bfloat16 instructions multiply it some seventy times as slowly as float32.
``--emulate`` takes float32 copies of the weights there, and rounds what each linear layer and each
attention returns to bfloat16, as those instructions (which add up in float32) do.

To measure another version of the code, run this file from a checkout of it with PYTHONPATH set.
"""

import argparse
import functools
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from tuned_model import load_tuned

sys.path.append(str(Path(__file__).resolve().parent.parent))
from llama_squad import attention as own_attention
from llama_squad.answers import extract_answer
from llama_squad.data import load_squad, sample_paragraphs
from llama_squad.predictors.base import batch_paragraphs
from llama_squad.predictors.local import LocalModel
from llama_squad.prompts import Record


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset_name", default="data/squad_v2", help="Dataset's folder.")
    parser.add_argument("--split", default="test")
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter")
    parser.add_argument("--num_samples", type=int, default=500, help="questions, about")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 32, 64])
    parser.add_argument("--num_beams", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--emulate", action="store_true")
    parser.add_argument("--out", default="bfloat16_noise.json")
    return parser.parse_args()


def emulate(model: nn.Module) -> None:
    """Multiply in float32 and round to bfloat16, in linear layers and attention."""

    def product(weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.float(), weight, bias).bfloat16()

    for module in model.modules():
        if type(module) is nn.Linear:
            bias = None if module.bias is None else module.bias.float()
            module.forward = functools.partial(product, module.weight.float(), bias)  # type: ignore[method-assign]
    attention = F.scaled_dot_product_attention

    def rounded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **more: Any) -> torch.Tensor:
        return attention(q.float(), k.float(), v.float(), **more).bfloat16()

    F.scaled_dot_product_attention = rounded  # type: ignore[assignment]
    own_attention._by_products = lambda dtype: False


def answer(model: LocalModel, records: Sequence[Record], size: int) -> dict[str, dict[str, Any]]:
    """Return what was answered, by question."""
    found = {}
    for batch in tqdm(list(batch_paragraphs(records, size)), str(size), mininterval=60):
        for prediction in model.answer(batch):
            reply = prediction.reply
            found[prediction.record["id"]] = {
                "answer": extract_answer(reply.completion).text,
                "best": reply.best.text if reply.best else "",
                "best_log_prob": reply.best.score if reply.best else 0.0,
                "no_answer_log_prob": reply.no_answer_score,
            }
    return found


def compare(name: str, runs: Sequence[dict[str, dict[str, Any]]]) -> None:
    """Print how far several runs over the same questions differ."""
    rows = [[run[id_] for run in runs] for id_ in runs[0]]

    def differ(key: str) -> int:
        return sum(len({item[key] for item in row}) > 1 for row in rows)

    def spread(key: str, which: Sequence[list[dict[str, Any]]]) -> str:
        gaps = sorted(max(x[key] for x in row) - min(x[key] for x in row) for row in which)
        if not gaps:
            return f"{'none':>22}"
        return f"{sum(gaps) / len(gaps):12.4f}{gaps[-1]:10.4f}"

    same = [row for row in rows if len({item["best"] for item in row}) == 1]
    print(
        f"{name:12}{differ('answer'):9}{differ('best'):12}{spread('no_answer_log_prob', rows)}"
        f"{spread('best_log_prob', same)}",
        flush=True,
    )


def main() -> None:
    """Run the benchmark."""
    args = parse()
    weights, encoder, prompt = load_tuned(args.model, args.adapter, args.dtype)
    if args.emulate:
        emulate(weights)
    model = LocalModel(weights, encoder, decoding="span", num_beams=args.num_beams, **prompt)
    split = load_squad(args.dataset_name)[args.split]
    records = list(sample_paragraphs(split, args.num_samples, seed=0))
    batches = [list(batch_paragraphs(records, size)) for size in args.batch_sizes]
    if any(one == other for one, other in itertools.combinations(batches, 2)):
        # as a paragraph is never parted
        sys.exit("bfloat16_noise.py: two of the batch sizes make the same batches: leave one out")
    runs: dict[int, dict[str, dict[str, Any]]] = {}
    for size in args.batch_sizes:
        start = time.perf_counter()
        runs[size] = answer(model, records, size)
        print(f"batch size {size}: {time.perf_counter() - start:.0f} s", flush=True)
        Path(args.out).write_text(json.dumps(runs, indent=1))
    print(f"{len(records)} questions, {args.dtype}{', emulated' * args.emulate}")
    print(f"{'':12}{'answers':>9}{'best spans':>12}{'|log P(?)|':>22}{'|log P(best)|':>22}")
    print(f"{'sizes':12}{'differ':>9}{'differ':>12}" + f"{'mean':>12}{'max':>10}" * 2)
    for (a, first), (b, second) in itertools.pairwise(runs.items()):
        compare(f"{a}, {b}", [first, second])
    compare("all", list(runs.values()))


if __name__ == "__main__":
    main()
