r"""Time evaluation: ours, batched ``generate``, and the original's way, one prompt at a time.

All run in one process on the same questions, interleaved: with a model and an adapter of
``train_llama_squad.py`` (no activated one, which ``generate`` does not know), or with a small model
that is first trained until it answers them (random weights are never sure, and a search's length is
decided by how sure the model is). That one is kept in the temporary folder and found again.

    python benchmarks/eval_speed.py --data ../shared/data/squad_v2/dev.json --model MODEL \
        --adapter DIR --dtype float32
    python benchmarks/eval_speed.py --data ../shared/data/squad_v2/dev.json \
        --tokenizer ../shared/data/tokenizers/llama3

For a GPU, an architecture with random weights and no training (untrained, so free decoding runs to
``--max_new_tokens``): ``--layers 32 --hidden 4096 --heads 32 --kv_heads 8 --intermediate 14336
--dtype bfloat16 --train_steps 0``.
"""

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from tuned_model import load_tuned

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from llama_squad.activation import activation_of
from llama_squad.answers import extract_answer
from llama_squad.collator import SquadDataCollator
from llama_squad.data import read_files
from llama_squad.decoding.generator import Generator
from llama_squad.decoding.replies import Paragraph
from llama_squad.decoding.search import SPECULATION
from llama_squad.encoding import IGNORE, ChatEncoder
from llama_squad.predictors.base import group_paragraphs
from llama_squad.prompts import Record, build_messages, gold_answer

Run = Callable[[], list[str]]
"""Answers all questions; returns the completions, by paragraph."""


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="official SQuAD JSON file")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="chat model: a folder, or a name on the Hub")
    model.add_argument("--tokenizer", help="of a small model that is made here")
    parser.add_argument("--adapter", help="of --model")
    parser.add_argument("--chat_template", help="jinja file (default: the tokenizer's, else TRL's)")
    parser.add_argument("--paragraphs", type=int, default=4)
    parser.add_argument("--questions", type=int, default=7, help="of a paragraph, at most")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1376)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv_heads", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--train_steps", type=int, default=300, help="at most")
    parser.add_argument("--num_beams", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--batch_size", type=int, default=7, help="questions, batched generate")
    parser.add_argument("--max_new_tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--speculation", type=float, nargs="*", default=[])
    parser.add_argument("--only", help="run the methods whose name holds this")
    return parser.parse_args()


def read_questions(args: argparse.Namespace) -> list[list[Record]]:
    """Return the questions of some paragraphs, taken evenly from the file."""
    groups = group_paragraphs(read_files([args.data]))
    step = max(1, len(groups) // args.paragraphs)
    return [group[: args.questions] for group in groups[::step][: args.paragraphs]]


def small_encoder(args: argparse.Namespace) -> ChatEncoder:
    """Return the encoder of the small model."""
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    if args.chat_template or not tokenizer.chat_template:
        trls = Path(str(find_spec("trl").origin)).parent / "chat_templates" / "llama3.jinja"  # type: ignore[union-attr]
        tokenizer.chat_template = Path(args.chat_template or trls).read_text(encoding="utf-8")
    return ChatEncoder(tokenizer)


def load_small(args: argparse.Namespace, encoder: ChatEncoder, groups: list[list[Record]]) -> Any:
    """Return the small model: trained before, or trained now, or with random weights."""
    key = [args.tokenizer, args.layers, args.hidden, args.intermediate, args.heads, args.kv_heads,
           [record["id"] for group in groups for record in group], args.train_steps]  # fmt: skip
    name = "llama-squad-" + hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir(), name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if (folder / "config.json").is_file():
        found: Any = LlamaForCausalLM.from_pretrained(folder, dtype=args.dtype)
        return found.to(device).eval()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(encoder.tokenizer), hidden_size=args.hidden,
        intermediate_size=args.intermediate, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, num_key_value_heads=args.kv_heads,
        max_position_embeddings=8192, eos_token_id=encoder.tokenizer.eos_token_id,
        bos_token_id=encoder.tokenizer.bos_token_id, tie_word_embeddings=args.train_steps > 0,
    )  # fmt: skip
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, args.dtype))
    if args.train_steps:
        overfit(model, encoder, groups, args.train_steps)
        part = folder.with_suffix(".part")
        model.save_pretrained(part)
        part.rename(folder)
    return model.eval()


def overfit(model: Any, encoder: ChatEncoder, groups: list[list[Record]], steps: int) -> None:
    """Train on the questions themselves until the loss is next to nothing.

    The embeddings, which are the head's too, stay random, and the softmax is over the tokens that
    occur and some others: the layers learn all the same, in a tenth of the time.
    """
    rows = [encoder.encode([build_messages(record) for record in group]) for group in groups]
    collator = SquadDataCollator(pad_token_id=0)
    batches = [collator([{"paragraphs": [row]}]) for row in rows]
    seen = torch.cat([batch["labels"].flatten() for batch in batches])
    others = torch.randint(model.config.vocab_size, (4096,))
    tokens = torch.cat([seen[seen != IGNORE], others]).unique()
    model.model.embed_tokens.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.model.layers.parameters(), lr=1e-3, betas=(0.9, 0.95))
    start = time.perf_counter()
    for step in range(steps):
        losses = []
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 10)
        for batch in batches:
            moved = {name: tensor.to(model.device) for name, tensor in batch.items()}
            labels = F.pad(moved.pop("labels"), (0, 1), value=IGNORE)[:, 1:]
            hidden = model.model(**moved).last_hidden_state[labels != IGNORE]
            logits = hidden @ model.lm_head.weight[tokens.to(model.device)].T
            targets = torch.searchsorted(tokens, labels[labels != IGNORE].cpu())
            loss = F.cross_entropy(logits.float(), targets.to(model.device))
            loss.backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} loss {max(losses):.4f} {time.perf_counter() - start:.0f} s", flush=True)
        if max(losses) < 0.01:
            return


def ours(
    model: Any, encoder: ChatEncoder, groups: list[list[Record]], together: bool,
    **options: Any
) -> Run:  # fmt: skip
    """Answer by paragraph, or all paragraphs together."""
    generator = Generator(model, encoder, **options)

    def run() -> list[str]:
        paragraphs = [Paragraph(group[0]["context"], encode(encoder, group)) for group in groups]
        batches = [paragraphs] if together else [[paragraph] for paragraph in paragraphs]
        return [
            reply.completion
            for batch in batches for row in generator.reply(batch) for reply in row
        ]  # fmt: skip

    return run


def plain(
    model: Any, encoder: ChatEncoder, groups: list[list[Record]], args: argparse.Namespace,
    *, num_beams: int, batch_size: int,
) -> Run:  # fmt: skip
    """Answer with ``generate``, ``batch_size`` prompts at a time, padded on the left."""
    pad = encoder.tokenizer.pad_token_id or 0

    def run() -> list[str]:
        prompts = [ids for group in groups for ids in encode(encoder, group)]
        completions = []
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            width = max(map(len, batch))
            ids = torch.tensor([[pad] * (width - len(p)) + p for p in batch])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
            more = {"length_penalty": 0.0} if num_beams > 1 else {}
            output = model.generate(
                ids.to(model.device), attention_mask=mask.to(model.device), do_sample=False,
                num_beams=num_beams, max_new_tokens=args.max_new_tokens, pad_token_id=pad, **more,
            )  # fmt: skip
            completions += encoder.tokenizer.batch_decode(
                output[:, width:], skip_special_tokens=True
            )
        return completions

    return run


def encode(encoder: ChatEncoder, group: list[Record]) -> list[list[int]]:
    """Return the prompts of a paragraph's questions."""
    return encoder.encode_prompts([build_messages(record, answer=False) for record in group])


def timed(run: Run) -> tuple[float, float, list[str]]:
    """Return wall-clock and processor seconds, and the completions."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall, processor = time.perf_counter(), time.process_time()
    completions = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - processor, completions


def methods(
    args: argparse.Namespace, model: Any, encoder: ChatEncoder, groups: list[list[Record]]
) -> dict[str, Run]:
    """Return what is compared, by name."""
    found: dict[str, Run] = {}
    for beams in args.num_beams:
        found[f"one prompt at a time, {beams} beams"] = plain(
            model, encoder, groups, args, num_beams=beams, batch_size=1
        )
        found[f"batched generate, {beams} beams"] = plain(
            model, encoder, groups, args, num_beams=beams, batch_size=args.batch_size
        )
        for decoding in ("free", "span"):
            for together in (False, True):
                where = "together" if together else "by paragraph"
                found[f"ours {decoding}, {beams} beams, {where}"] = ours(
                    model, encoder, groups, together, decoding=decoding, num_beams=beams,
                    max_new_tokens=args.max_new_tokens,
                )  # fmt: skip
    return {name: run for name, run in found.items() if not args.only or args.only in name}


def report(golds: Sequence[str], seconds: dict[str, list[tuple[float, float]]],
           completions: dict[str, list[str]]) -> None:  # fmt: skip
    """Print questions per second, and how many of the answers are right."""
    print(f"\n{'':44}{'questions per second':>24}{'CPU s per question':>20}{'right':>8}")
    print(f"{'':44}{'min':>8}{'median':>8}{'max':>8}{'median':>20}")
    for name, pairs in seconds.items():
        rates = sorted(len(golds) / wall for wall, _ in pairs)
        cpu = statistics.median(processor for _, processor in pairs) / len(golds)
        right = sum(
            extract_answer(text).text == gold
            for text, gold in zip(completions[name], golds, strict=True)
        )
        print(
            f"{name:44}{rates[0]:8.2f}{statistics.median(rates):8.2f}{rates[-1]:8.2f}"
            f"{cpu:20.4f}{right:5}/{len(golds)}"
        )


def main() -> None:
    """Run the benchmark."""
    args = parse()
    groups = read_questions(args)
    if args.model:
        model, encoder, _ = load_tuned(args.model, args.adapter, args.dtype)
        if activation_of(model):
            sys.exit(f"eval_speed.py: {args.adapter} is activated: generate cannot run it")
    else:
        encoder = small_encoder(args)
        model = load_small(args, encoder, groups)
    golds = [gold_answer(record) for group in groups for record in group]
    prompts = [ids for group in groups for ids in encode(encoder, group)]
    print(f"{len(golds)} questions of {len(groups)} paragraphs, "
          f"{sum(map(len, prompts)) / len(prompts):.0f} tokens per prompt")  # fmt: skip
    compared = methods(args, model, encoder, groups)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in compared}
    completions: dict[str, list[str]] = {}
    for repeat in range(args.repeats):
        for name, run in compared.items():
            wall, processor, completions[name] = timed(run)
            seconds[name].append((wall, processor))
            print(f"{repeat} {name}: {wall:.2f} s", flush=True)
    report(golds, seconds, completions)
    print(f"\nspeculation {SPECULATION}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
