"""Throwaway tokenizer, models, records and datasets that the training tests share."""

import functools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from llama_squad import rows
from llama_squad.collator import ConversationEncoder, SquadDataCollator
from llama_squad.config import CreateArguments
from llama_squad.data import write_dataset
from llama_squad.prompts import build_messages
from llama_squad.training import SquadSFTConfig, SquadTrainer, answer_loss

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
)
CONTROL = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SYLLABLES = ["ka", "lo", "mir", "ven", "tu", "sha", "bri", "dol", "en", "gar"]


def make_records(paragraphs: int, questions: Sequence[int], seed: int = 0) -> list[dict[str, Any]]:
    """Make SQuAD records; paragraph i has ``questions[i % len(questions)]`` of them."""
    rng = random.Random(seed)

    def name() -> str:
        return "".join(rng.sample(SYLLABLES, 3)).capitalize()

    records = []
    for p in range(paragraphs):
        names = [name() for _ in range(rng.randint(5, 9))]
        context = " ".join(
            f"{a} met {b} in {rng.randint(1500, 1999)}." for a in names for b in names[:2]
        )
        for q in range(questions[p % len(questions)]):
            answer = rng.choice(names)
            found = {"text": [answer], "answer_start": [context.index(answer)]}
            records.append(
                {
                    "id": f"{seed}-{p}-{q}",
                    "title": f"Title {p // 3}",
                    "context": context,
                    "question": f"Who met {name()} {q}?",
                    "answers": found if q % 3 else {"text": [], "answer_start": []},
                }
            )
    return records


@functools.cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer of 600 tokens, with Llama 3's chat template."""
    texts = [
        message["content"] for r in make_records(20, [3], seed=9) for message in build_messages(r)
    ]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=[*CONTROL, "<|reserved_special_token_0|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=CONTROL[0], eos_token=CONTROL[3], pad_token=CONTROL[3]
    )
    tokenizer.chat_template = LLAMA3
    return tokenizer


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": None},
    "gemma": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 2048, "num_hidden_layers": 6},
    "phi": {},
    "phi3": {"pad_token_id": 0},
}
"""Tiny architectures that take a tree's mask, and what their configuration needs beside the sizes."""


def tiny_model(
    architecture: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any
) -> Any:
    """Make a model of random weights, large enough for attention to matter; dropout is 0."""
    torch.manual_seed(seed)
    attention = config.pop("attn_implementation", "sdpa")
    sizes = {
        "vocab_size": 640,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
    }
    settings = sizes | ARCHITECTURES.get(architecture, {}) | config
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(architecture, **settings), dtype=dtype, attn_implementation=attention
    )
    if dtype == torch.float64:
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = functools.partial(_norm, module, "Gemma" in type(module).__name__)
    return model.eval()


def _norm(module: Any, one_plus: bool, x: torch.Tensor) -> torch.Tensor:
    """Normalise in the precision of ``x``: the library's own norms go down to float32."""
    epsilon = getattr(module, "variance_epsilon", None) or module.eps
    scale = 1 + module.weight if one_plus else module.weight
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * scale


def encode_paragraphs(
    records: Sequence[Mapping[str, Any]],
    prompt: str = "single_turn",
    reasoning_tokens: int = 0,
) -> list[list[dict[str, list[int]]]]:
    """Encode records, grouped by their context."""
    tokenizer = tiny_tokenizer()
    pause = tokenizer.added_tokens_encoder["<|reserved_special_token_0|>"]
    encoder = ConversationEncoder(tokenizer, reasoning_tokens, pause)
    grouped: dict[str, list[dict[str, list[int]]]] = {}
    encoded = encoder.encode([build_messages(record, prompt) for record in records])
    for record, example in zip(records, encoded, strict=True):
        grouped.setdefault(record["context"], []).append(example)
    return list(grouped.values())


def collator() -> SquadDataCollator:
    """Make the collator, the end of turn as the pad token."""
    return SquadDataCollator(pad_token_id=tiny_tokenizer().pad_token_id)


def flatten(paragraphs: Sequence[Sequence[Any]]) -> list[Any]:
    """Return all examples of some paragraphs, in order."""
    return [example for paragraph in paragraphs for example in paragraph]


def outcome(
    model: Any, batches: Sequence[Mapping[str, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return the logits of the supervised positions, the mean loss, and its gradients by name."""
    count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    model.zero_grad(set_to_none=True)
    total = torch.zeros((), dtype=next(model.parameters()).dtype)
    logits = []
    for batch in batches:
        loss, _, _ = answer_loss(model, batch)
        (loss / count).backward()
        total = total + loss.detach() / count
        keep = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100) != -100
        features = {key: value for key, value in batch.items() if key != "labels"}
        with torch.no_grad():
            logits.append(model(**features, use_cache=False).logits[keep])
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return torch.cat(logits), total, gradients


def difference(
    model: Any,
    shared: Sequence[Mapping[str, torch.Tensor]],
    separate: Sequence[Mapping[str, torch.Tensor]],
) -> dict[str, float]:
    """Return how far shared batches are from separate ones, relative to the largest figure."""
    first, second = outcome(model, shared), outcome(model, separate)
    assert first[2].keys() == second[2].keys()
    assert first[2], "nothing is trained"
    largest = max(float(gradient.abs().max()) for gradient in second[2].values())
    assert largest > 0
    gaps = [float((first[2][name] - second[2][name]).abs().max()) for name in second[2]]
    return {
        "logits": float((first[0] - second[0]).abs().max() / second[0].abs().max()),
        "loss": float(abs(first[1] - second[1]) / second[1]),
        "gradients": max(gaps) / largest,
    }


def dataset_folder(
    folder: Path, records: Sequence[dict], val: Sequence[dict] = (), **create: Any
) -> str:
    """Write a dataset as ``create_squad_dataset.py`` does."""
    splits = {"train": list(records)} | ({"val": list(val)} if val else {})
    name = str(folder / "dataset")
    write_dataset(splits, CreateArguments(dataset_name=name, **create))
    return name


def model_folder(folder: Path, architecture: str = "llama", **config: Any) -> str:
    """Save a tiny model with the tiny tokenizer."""
    name = str(folder / "model")
    tiny_model(architecture, **config).save_pretrained(name)
    tiny_tokenizer().save_pretrained(name)
    return name


def encoded_dataset(records: Sequence[dict], max_length: int | None = 4096) -> Any:
    """Encode records as the training stage does."""
    from datasets import Dataset

    split = Dataset.from_list([{**r, "messages": build_messages(r)} for r in records])
    return rows.encode_split(split, ConversationEncoder(tiny_tokenizer()), max_length, "test")[0]


def make_trainer(model: Any, train_dataset: Any, folder: Path, **settings: Any) -> SquadTrainer:
    """Make our trainer with plain SGD, whose step shows the gradient as it is."""
    cls = settings.pop("trainer", SquadTrainer)
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "optim": "sgd",
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "gradient_checkpointing": False,
        "bf16": False,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }
    return cls(
        model=model,
        args=SquadSFTConfig(**options | settings),
        data_collator=collator(),
        train_dataset=train_dataset,
        processing_class=tiny_tokenizer(),
    )
