"""How much of a tuning survives the merge, on a real model and real questions.

Tunes a LoRA adapter for a few steps at each of several tiny rates (B comes out near rate times
steps), merges it by the code of ``--merge_and_push`` in each way, and measures base, adapter and
merged model on validation questions. Beside them stands PEFT's own merge into bfloat16 weights,
which rounds to nearest. Exits with 1 where a merge of ours keeps less than 98 % of the gain.

    python benchmarks/merge_error.py --model_name ../models/smollm2
    python benchmarks/merge_error.py --model_name ../models/smollm2 --adapter results/run/final

All compute in float32, in which bfloat16 weights are exact: the loss is a matter of the weights. On
a CPU without bfloat16 instructions nothing else is practical, either.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

WAYS: dict[str, dict[str, Any]] = {
    "bfloat16": {"quantize": False, "merged_dtype": "bfloat16"},
    "float32": {"quantize": False, "merged_dtype": "float32"},
    "bfloat16, from 4 bits": {"quantize": True, "merged_dtype": "bfloat16"},
    "float32, from 4 bits": {"quantize": True, "merged_dtype": "float32"},
}


def paragraphs(split: Any, encoder: Any, seed: int) -> Iterator[dict[str, Any]]:
    """Yield rows of one paragraph each, in random order."""
    members: dict[str, list[int]] = {}
    for index, context in enumerate(split["context"]):
        members.setdefault(context, []).append(index)
    order = list(members.values())
    random.Random(seed).shuffle(order)
    for indices in order:
        examples = encoder.encode(split.select(indices)["messages"])
        yield {"paragraphs": [examples]}


def tune(args: argparse.Namespace, rate: float, batches: Sequence[Any], folder: Path) -> float:
    """Tune an adapter at a constant rate, and save it; return its largest B."""
    from llama_squad.arguments import ModelArguments, TrainArguments
    from llama_squad.modeling import load_model
    from llama_squad.training.setup import add_lora
    from llama_squad.training.trainer import answer_loss

    torch.manual_seed(0)
    model = add_lora(
        load_model(ModelArguments(model_name=args.model_name, dtype="float32")),
        TrainArguments(quantize=False, lora_dropout=0.0),
    )
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    for step, batch in enumerate(batches, start=1):
        loss, _, tokens = answer_loss(model, batch)
        (loss / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"rate {rate:g}, step {step}: loss {loss / tokens:.4f}", file=sys.stderr, flush=True)
    model.save_pretrained(str(folder))
    return max(p.abs().max().item() for n, p in model.named_parameters() if "lora_B" in n)


def merge_nearest(args: argparse.Namespace, adapter: Path, sample: Any) -> Any:
    """Measure PEFT's own merge into bfloat16 weights."""
    from llama_squad import modeling
    from llama_squad.arguments import ModelArguments
    from llama_squad.training.merge_error import MergeMeter

    def load(dtype: Any) -> Any:
        model_args = ModelArguments(model_name=args.model_name, dtype=dtype)
        base = modeling.load_model(model_args)
        return modeling.attach_adapter(base, str(adapter), args.model_name)

    meter = MergeMeter(load("float32"), sample)
    return meter.measure(load("bfloat16").merge_and_unload().float(), torch.bfloat16)


def compare(args: argparse.Namespace, name: str, adapter: Path, sample: Any) -> bool:
    """Print the rows of one adapter; tell whether each merge of ours keeps 98 % of its gain."""
    from llama_squad.arguments import ModelArguments, TrainArguments
    from llama_squad.training.publishing import merge_adapter

    good = True
    for way in ["PEFT's own, bfloat16", *WAYS]:
        started = time.perf_counter()
        if way in WAYS:
            train_args = TrainArguments(**WAYS[way])
            model_args = ModelArguments(model_name=args.model_name, dtype="float32")
            with tempfile.TemporaryDirectory() as folder:
                error = merge_adapter(train_args, model_args, adapter, Path(folder), sample)
            good &= error.kept is not None and error.kept >= 0.98
        else:
            error = merge_nearest(args, adapter, sample)
        kept = "none" if error.kept is None else f"{error.kept:.2%}"
        print(
            f"| {name} | {way} | {error.base_loss:.4f} | {error.adapter_loss:.4f} "
            f"| {error.merged_loss:.4f} | {kept} | {error.base_shift:.4f} "
            f"| {error.merged_shift:.5f} | {time.perf_counter() - started:.0f} |",
            flush=True,
        )
    return good


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model_name", required=True, help="Folder or Hub name of the base model.")
    parser.add_argument("--dataset_name", default="data/squad_v2", help="Dataset's folder.")
    parser.add_argument("--adapter", type=Path, help="A trained adapter, instead of tuning some.")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 1e-5])
    parser.add_argument("--steps", type=int, default=10, help="One paragraph per step.")
    parser.add_argument("--questions", type=int, default=64, help="Validation questions.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    from llama_squad.arguments import ModelArguments
    from llama_squad.collator import SquadDataCollator
    from llama_squad.data import load_squad
    from llama_squad.modeling import load_encoder
    from llama_squad.training.merge_error import Sample

    dataset = load_squad(args.dataset_name)
    encoder = load_encoder(ModelArguments(model_name=args.model_name))
    collator = SquadDataCollator(pad_token_id=encoder.tokenizer.pad_token_id)
    held_out = paragraphs(dataset["val"], encoder, args.seed)
    sample = Sample.take(held_out, collator, args.questions)
    print(f"{sample.questions} validation questions, {json.dumps(vars(args), default=str)}\n")
    print("| adapter | merged | base loss | adapter loss | merged loss | kept | base shift "
          "| merged shift | s |\n|---|---|--:|--:|--:|--:|--:|--:|--:|")  # fmt: skip
    if args.adapter:
        sys.exit(not compare(args, args.adapter.name, args.adapter, sample))
    train = paragraphs(dataset["train"], encoder, args.seed)
    batches = [collator([next(train)]) for _ in range(args.steps)]
    good = True
    for rate in args.rates:
        with tempfile.TemporaryDirectory() as folder:
            largest = tune(args, rate, batches, Path(folder))
            good &= compare(args, f"B up to {largest:.1e}", Path(folder), sample)
    sys.exit(not good)


if __name__ == "__main__":
    main()
