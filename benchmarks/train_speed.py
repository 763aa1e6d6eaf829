r"""Time training on shared contexts against its peers: same examples, labels, model and adapter.

Real SQuAD paragraphs under the Llama 3 tokenizer and template; the model has random weights, for
speed does not depend on them. Every way trains one epoch over the same questions through its own
trainer, in an optimizer step of about as many questions, interleaved, several times. Before timing,
the batches of each way are compared: the same supervised tokens, and the same loss.

- shared: ``SquadTrainer`` on rows that share contexts (``train_llama_squad.py``'s own path).
- packed N: TRL's ``SFTTrainer``, best-fit-decreasing packing to N tokens, padding-free; sdpa
  attention keeps the documents apart by their position ids.
- packed N, our loss: the same batches, but logits for the supervised positions only, as ours. On
  CUDA TRL's own head does that; on a CPU it scores every position, which is most of the cost of a
  small model. What is left between this and ours is the sharing of contexts.
- grouped: TRL's ``SFTTrainer``, padded batches of examples of similar length.
- original: padded batches in random order and full logits, with transformers' ``Trainer``, as the
  original's script did.

    python benchmarks/train_speed.py                                   # 4 layers of 512, on a CPU
    python benchmarks/train_speed.py --layers 32 --hidden 4096 --intermediate 14336 --heads 32 \
        --kv_heads 8 --paragraphs 64 --questions_per_step 128 --quantize --bf16   # 8B, on a GPU

Prints a report; ``--json FILE`` keeps the raw figures.
"""

# Long: four ways of training side by side, each of which needs the others' settings.
import argparse
import contextlib
import functools
import gc
import json
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads must not count as CPU time
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared" / "data"

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "4090": 165.0}
"""Dense bfloat16 peak by a part of the device's name."""

WAYS = ["shared", "packed_our_loss", "packed", "grouped", "original"]


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--train_files", default=str(SHARED / "squad_v2" / "train-*.json"))
    add("--tokenizer", default=str(SHARED / "tokenizers" / "llama3"))
    add("--chat_template", help="jinja file (default: TRL's llama3.jinja)")
    add("--prompt", default="single_turn")
    add("--paragraphs", type=int, default=12, help="random paragraphs, with all their questions")
    add("--seed", type=int, default=0)
    add("--layers", type=int, default=4)
    add("--hidden", type=int, default=512)
    add("--intermediate", type=int, default=1376)
    add("--heads", type=int, default=8)
    add("--kv_heads", type=int, default=8)
    add("--quantize", action="store_true", help="QLoRA: the base in 4 bits")
    add("--bf16", action="store_true", help="compute in bfloat16")
    add("--gradient_checkpointing", action="store_true")
    add("--lora_dropout", type=float, default=0.1)
    add("--questions_per_step", type=int, default=16)
    add("--row_tokens", type=int, nargs="+", help="of shared (default: the stage's own)")
    add("--pack", type=int, nargs="+", default=[1024, 2048], help="lengths of packed")
    add("--batch", type=int, default=4, help="examples per batch of grouped and original")
    add("--ways", nargs="+", choices=WAYS, default=WAYS)
    add("--repeats", type=int, default=5)
    add("--threads", type=int, help="CPU threads (default: all)")
    add("--peak_tflops", type=float, help="of the device in bfloat16 (default: by its name)")
    add("--json", help="file for the raw figures")
    return parser.parse_args()


# Data and model --------------------------------------------------------------------------------


def encode_sample(args: argparse.Namespace) -> tuple[Any, Any, float]:
    """Encode random paragraphs; return encoder, dataset, and the questions per paragraph in all."""
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    from llama_squad.data import read_files
    from llama_squad.encoding import ChatEncoder
    from llama_squad.prompts import Record, build_messages
    from llama_squad.training.examples import encode_split

    records = read_files([args.train_files])
    members: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        members.setdefault((record["title"], record["context"]), []).append(record)
    chosen = random.Random(args.seed).sample(list(members.values()), args.paragraphs)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    template = args.chat_template or Path(trl.__file__).parent / "chat_templates" / "llama3.jinja"
    tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    tokenizer.pad_token = tokenizer.eos_token
    encoder = ChatEncoder(tokenizer)
    examples = [
        {**record, "messages": build_messages(record, args.prompt)}
        for paragraph in chosen
        for record in paragraph
    ]
    encoded, dropped = encode_split(Dataset.from_list(examples), encoder, 4096, "sample")
    assert not dropped
    return encoder, encoded, len(records) / len(members)


def save_base(args: argparse.Namespace, vocab_size: int, folder: str) -> None:
    """Save a Llama of random weights."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=8192,
    )
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)


# The ways --------------------------------------------------------------------------------------


class Bench:
    """What all ways have in common: the examples, the base model, and the trainers' settings."""

    def __init__(self, args: argparse.Namespace, folder: str) -> None:
        from llama_squad.arguments import ModelArguments, TrainArguments

        self.args = args
        self.encoder, self.encoded, self.corpus_ratio = encode_sample(args)
        self.folder = folder
        save_base(args, len(self.encoder.tokenizer), folder)
        self.train_args = TrainArguments(quantize=args.quantize, lora_dropout=args.lora_dropout)
        self.model_args = ModelArguments(
            model_name=folder, dtype="bfloat16" if args.bf16 else "float32"
        )
        self.questions = len(self.encoded)
        self.plain_tokens = sum(self.encoded["length"])

    def model(self) -> Any:
        """Load the base and put a new adapter on it, the same each time."""
        import torch

        torch.manual_seed(self.args.seed)
        from llama_squad.training.setup import prepare_model

        return prepare_model(self.train_args, self.model_args, self.encoder)

    def settings(self, **more: Any) -> dict[str, Any]:
        """Return the settings that all trainers share."""
        return {
            "output_dir": self.folder + "/run",
            "num_train_epochs": 1,
            "learning_rate": 2e-7,
            "gradient_checkpointing": self.args.gradient_checkpointing,
            "bf16": self.args.bf16,
            "seed": self.args.seed,
            "report_to": "none",
            "logging_strategy": "no",
            "save_strategy": "no",
            "eval_strategy": "no",
            "disable_tqdm": True,
            **more,
        }

    def shared(self, row_tokens: int) -> Any:
        """Make our trainer."""
        import dataclasses

        from llama_squad.collator import SquadDataCollator
        from llama_squad.training.arguments import SquadSFTConfig
        from llama_squad.training.setup import lay_out
        from llama_squad.training.trainer import SquadTrainer

        sft_args = SquadSFTConfig(
            **self.settings(
                per_device_train_batch_size=self.args.questions_per_step,
                gradient_accumulation_steps=1,
            )
        )
        pad = self.encoder.tokenizer.pad_token_id
        collator = SquadDataCollator(pad_token_id=pad, counts=True)
        model = self.model()
        train_args = dataclasses.replace(self.train_args, row_tokens=row_tokens)
        layout = lay_out(train_args, sft_args, {"train": self.encoded}, model, collator)
        assert "paragraphs" in layout.features["train"].column_names, "contexts are not shared"
        return SquadTrainer(
            model=model,
            args=sft_args.replace(**layout.settings),
            data_collator=collator,
            train_dataset=layout.features["train"],
            processing_class=self.encoder.tokenizer,
        )

    def packed(self, length: int, our_loss: bool = False) -> Any:
        """Make TRL's trainer with packing, with its own loss or with ours."""
        from trl import SFTConfig, SFTTrainer

        from llama_squad.training.trainer import answer_loss

        class AnswerTrainer(SFTTrainer):
            def compute_loss(
                self,
                model: Any,
                inputs: Any,
                return_outputs: bool = False,
                num_items_in_batch: Any = None,
            ) -> Any:
                return answer_loss(model, inputs)[0] / num_items_in_batch

        longest = max(self.encoded["length"])
        if longest > length:
            raise SystemExit(f"--pack {length} would cut an example of {longest} tokens")
        mean = self.plain_tokens / self.questions
        steps = max(1, round(self.args.questions_per_step * mean / (length * 0.93)))
        return (AnswerTrainer if our_loss else SFTTrainer)(
            model=self.model(),
            args=SFTConfig(
                **self.settings(
                    per_device_train_batch_size=1,
                    gradient_accumulation_steps=steps,
                    packing=True,
                    packing_strategy="bfd",
                    max_length=length,
                )
            ),
            train_dataset=self.encoded.select_columns(["input_ids", "labels"]),
            processing_class=self.encoder.tokenizer,
        )

    def grouped(self) -> Any:
        """Make TRL's trainer with padded batches, grouped by length."""
        from trl import SFTConfig, SFTTrainer

        return SFTTrainer(
            model=self.model(),
            args=SFTConfig(
                **self.settings(
                    per_device_train_batch_size=self.args.batch,
                    gradient_accumulation_steps=self._accumulation(),
                    train_sampling_strategy="group_by_length",
                    max_length=None,
                )
            ),
            train_dataset=self.encoded.select_columns(["input_ids", "labels"]),
            processing_class=self.encoder.tokenizer,
        )

    def original(self) -> Any:
        """Make transformers' trainer with padded batches and full logits."""
        from transformers import Trainer, TrainingArguments

        from llama_squad.collator import SquadDataCollator

        return Trainer(
            model=self.model(),
            args=TrainingArguments(
                **self.settings(
                    per_device_train_batch_size=self.args.batch,
                    gradient_accumulation_steps=self._accumulation(),
                    remove_unused_columns=False,
                )
            ),
            data_collator=SquadDataCollator(pad_token_id=self.encoder.tokenizer.pad_token_id),
            train_dataset=self.encoded.select_columns(["input_ids", "labels"]),
        )

    def _accumulation(self) -> int:
        return max(1, round(self.args.questions_per_step / self.args.batch))

    def ways(self) -> dict[str, Callable[[], Any]]:
        """Return the ways that were asked for, by name."""
        from llama_squad.arguments import TrainArguments

        found: dict[str, Callable[[], Any]] = {}
        budgets = self.args.row_tokens or [TrainArguments().row_tokens]
        for budget in budgets if "shared" in self.args.ways else []:
            name = "shared" if len(budgets) == 1 else f"shared {budget}"
            found[name] = functools.partial(self.shared, budget)
        for way in ("packed_our_loss", "packed"):
            for length in self.args.pack if way in self.args.ways else []:
                ours = way == "packed_our_loss"
                name = f"packed {length}" + (", our loss" if ours else "")
                found[name] = functools.partial(self.packed, length, ours)
        plain = {"grouped": self.grouped, "original": self.original}
        found |= {name: make for name, make in plain.items() if name in self.args.ways}
        return found


# Checking and timing ---------------------------------------------------------------------------


def batches_of(trainer: Any) -> Iterator[dict[str, Any]]:
    """Yield the batches that a trainer trains on."""
    device = trainer.args.device
    for batch in trainer.get_train_dataloader():
        yield {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()}


def inspect(trainer: Any) -> dict[str, float]:
    """Count a way's batches and sum its loss over one epoch, without training."""
    import torch
    import torch.nn.functional as F

    counts = dict.fromkeys(("batches", "positions", "supervised", "label_sum", "loss"), 0.0)
    model = trainer.model
    model.eval()
    for batch in batches_of(trainer):
        labels = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        keep = labels != -100
        features = {k: v for k, v in batch.items() if k != "labels"}
        with torch.no_grad():
            logits = model(**features, logits_to_keep=keep, use_cache=False).logits.float()
        counts["batches"] += 1
        counts["positions"] += labels.numel()
        counts["supervised"] += int(keep.sum())
        counts["label_sum"] += int(labels[keep].sum())
        counts["loss"] += float(F.cross_entropy(logits, labels[keep], reduction="sum"))
    counts["loss"] /= counts["supervised"]
    model.train()
    return counts


def check_same_work(found: dict[str, dict[str, float]], exact: bool) -> None:
    """Stop where the ways do not train on the same tokens with the same loss."""
    reference = next(iter(found.values()))
    for name, counts in found.items():
        for key in ("supervised", "label_sum"):
            if counts[key] != reference[key]:
                sys.exit(f"{name} trains on other tokens: {counts} against {reference}")
        if abs(counts["loss"] - reference["loss"]) > (1e-4 if exact else 3e-2):
            sys.exit(f"{name} has another loss: {counts['loss']} against {reference['loss']}")


def reset_peak() -> None:
    """Forget the peak memory so far."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # Linux: 5 resets the high-water mark
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float:
    """Return the peak since ``reset_peak`` in GiB: of the GPU, or of the process on a CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def run_once(make: Callable[[], Any]) -> dict[str, float]:
    """Train one epoch; return wall and CPU seconds, peak memory and steps."""
    import torch

    with contextlib.redirect_stdout(sys.stderr):
        trainer = make()
    reset_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    result = {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "peak_gib": peak_memory(),
        "steps": trainer.state.global_step,
    }
    del trainer
    gc.collect()
    return result


def model_flops(args: argparse.Namespace, positions: float, supervised: float, vocab: int) -> float:
    """Count the floating-point operations of an epoch that the weights ask for.

    Forward and backward through frozen weights are 2 and 2 operations per weight and position (no
    gradient of the weight itself); the adapter's are 6. The vocabulary counts for supervised
    positions. Attention, dequantisation and recomputation are left out, as is usual.
    """
    h, kv = args.hidden, args.hidden // args.heads * args.kv_heads
    shapes = [(h, h), (h, kv), (h, kv), (h, h)] + [(h, args.intermediate)] * 3
    base = sum(a * b for a, b in shapes) * args.layers
    adapter = sum(64 * (a + b) for a, b in shapes) * args.layers
    return positions * (4 * base + 6 * adapter) + supervised * 4 * h * vocab


# The report ------------------------------------------------------------------------------------


def spread(values: list[float], digits: int = 2) -> str:
    """Return min/median/max."""
    figures = (min(values), statistics.median(values), max(values))
    return "/".join(f"{value:.{digits}f}" for value in figures)


def report(bench: Bench, counts: dict[str, dict[str, float]], runs: dict[str, list[dict]]) -> str:
    """Return the report in Markdown."""
    import torch

    args, questions = bench.args, bench.questions
    cuda = torch.cuda.is_available()
    clock = "wall" if cuda else "cpu"
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    ours = next(iter(runs))
    lines = [
        f"{args.paragraphs} paragraphs, {questions} questions "
        f"({questions / args.paragraphs:.2f} a paragraph; in all of train "
        f"{bench.corpus_ratio:.2f}), {bench.plain_tokens:,} tokens separately, "
        f"{args.layers} layers of {args.hidden}, LoRA r=64, {device}, load "
        f"{' '.join(f'{x:.1f}' for x in os.getloadavg())}. Examples a second by "
        f"{'wall-clock' if cuda else 'CPU time'}; {args.repeats} interleaved repeats, "
        "min/median/max.",
        "",
        "| way | examples/s | examples/s, wall | tokens | steps | peak GiB | ours is faster by "
        "| by wall | limit by tokens |" + (" model FLOPs used |" if cuda else ""),
        "|---|---|---|---|---|---|---|---|---|" + ("---|" if cuda else ""),
    ]
    name = torch.cuda.get_device_name() if cuda else ""
    peak = args.peak_tflops or next((v for k, v in PEAK_TFLOPS.items() if k in name), None)
    vocab = len(bench.encoder.tokenizer)
    for way, results in runs.items():
        ratio = {
            key: [theirs[key] / our[key] for theirs, our in zip(results, runs[ours], strict=True)]
            for key in (clock, "wall")
        }
        positions = counts[way]["positions"]
        line = (
            f"| {way} | {spread([questions / r[clock] for r in results])} "
            f"| {spread([questions / r['wall'] for r in results])} "
            f"| {positions:,.0f} | {results[0]['steps']:.0f} "
            f"| {max(r['peak_gib'] for r in results):.2f} | {spread(ratio[clock])} "
            f"| {spread(ratio['wall'])} | {positions / counts[ours]['positions']:.2f} |"
        )
        if cuda:
            flops = model_flops(args, positions, counts[way]["supervised"], vocab)
            used = [flops / r["wall"] / (peak * 1e12) for r in results] if peak else []
            line += f" {spread(used)} |" if used else " ? (--peak_tflops) |"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    """Check that the ways do the same work, time them, and report."""
    args = arguments()
    import datasets
    import torch
    import transformers

    if args.threads:
        torch.set_num_threads(args.threads)
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    folder = tempfile.mkdtemp(prefix="train_speed.")
    try:
        bench = Bench(args, folder)
        ways = bench.ways()
        counts = {}
        for name, make in ways.items():
            with contextlib.redirect_stdout(sys.stderr):
                counts[name] = inspect(make())
            print(f"{name}: {counts[name]}", file=sys.stderr, flush=True)
        check_same_work(counts, exact=not (args.quantize or args.bf16))
        runs: dict[str, list[dict]] = {name: [] for name in ways}
        for repeat in range(args.repeats):
            for name, make in ways.items():
                runs[name].append(run_once(make))
                took = " ".join(f"{k} {v:.2f}" for k, v in runs[name][-1].items())
                print(f"repeat {repeat}, {name}: {took}", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(report(bench, counts, runs))
    if args.json:
        raw = {"args": vars(args), "machine": platform.platform(), "counts": counts, "runs": runs}
        Path(args.json).write_text(json.dumps(raw, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
