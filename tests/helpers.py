"""Throwaway tokenizers, models, records and datasets that the tests share.

No test needs the real tokenizers of ``../shared``: ``TOKENIZERS`` holds some made here of the same
kinds, with the same templates, and the real ones beside them only where that folder is.
"""

import functools
import json
import random
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import check_masks
import pytest
import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForQuestionAnswering,
    PreTrainedTokenizerFast,
)

from llama_squad.answers import format_answer
from llama_squad.arguments import CreateArguments
from llama_squad.collator import SquadDataCollator
from llama_squad.data import read_files, write_dataset
from llama_squad.encoding import ChatEncoder
from llama_squad.prompts import Record, build_messages
from llama_squad.supervised import answer_logits
from llama_squad.training.arguments import SquadSFTConfig
from llama_squad.training.examples import encode_split
from llama_squad.training.trainer import SquadTrainer, answer_loss

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"

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


# Tokenizers of the kinds that chat models have ---------------------------------------------------

TOKENIZERS = [
    ("sentencepiece", "llama2", " </s>"),
    ("bytes", "llama3", "<|eot_id|>"),
    ("bytes", "llama3_1", "<|eot_id|>"),
    ("nfc", "qwen2_5", "<|im_end|>"),
    ("nfc", "qwen3", "<|im_end|>"),
    ("digits", "qwen2_5", "<|im_end|>"),
    ("metaspace", "mistral", "</s>"),
    ("white", "gemma3", "<end_of_turn>"),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in check_masks.CASES
        if SHARED_DATA.is_dir()
    ),
]
"""Tokenizer, chat template, and what follows an answer: a space that the template writes, and the
end of the turn. The first is Llama 2's kind, "metaspace" the same as newer files write it, "bytes"
Llama 3's, "nfc" Qwen's, "digits" SmolLM2's, "white" Gemma's (added tokens of white space); after them, where they are, the real ones, which take
seconds each."""

SPECIAL = {
    "bytes": [*CONTROL, "<|end_of_text|>"],
    "nfc": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"],
    "digits": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
}
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where Llama 3 cuts a text into words; Qwen does the same, but for each digit alone."""


def read_quickstart(split: str = "train") -> list[Record]:
    """Return the records of the quickstart's world: whole paragraphs of it, one after the other."""
    return read_files([str(ROOT / "quickstart" / "data" / f"{split}.json")])


@functools.cache
def load_tokenizer(name: str, template: str) -> PreTrainedTokenizerFast:
    """Make one of the tokenizers above, or load a real one, with its chat template."""
    if name in ("sentencepiece", "metaspace", "white"):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=_sentencepiece(name),
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
        )
        if name == "white":
            ends = [AddedToken(f"<{end}_of_turn>", normalized=False) for end in ("start", "end")]
            tokenizer.add_special_tokens({"additional_special_tokens": ends})
            white = ["\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁"]
            tokenizer.add_tokens([AddedToken(token, normalized=False) for token in white])
    elif name in SPECIAL:
        special = SPECIAL[name]
        more = {"bos_token": special[0]} if name == "bytes" else {"pad_token": special[0]}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=_byte_level(name), eos_token=special[3 if name == "bytes" else 2],
            **more,
        )  # fmt: skip
    else:
        return check_masks.load_tokenizer(check_masks.SHARED, name, template)
    tokenizer.chat_template = check_masks.chat_template(template)
    return tokenizer


@functools.cache
def load_encoder(name: str, template: str) -> ChatEncoder:
    """Return the encoder of ``load_tokenizer``'s tokenizer."""
    return ChatEncoder(load_tokenizer(name, template))


def _corpus() -> list[str]:
    """Return text to train on: a part of the quickstart's world, and replies that hold spans."""
    records = read_quickstart()[::8]
    texts = [message["content"] for record in records for message in build_messages(record)]
    punctuation = ["(1990s", "“twice”", '"R&B"', "it's", "U.S.)", "$5\\10", "Née", "中文", "?"]
    return texts + 60 * [f'{format_answer(text)} "{text}" ({text})' for text in punctuation]


def _byte_level(kind: str) -> Tokenizer:
    """Train a byte-level vocabulary, cut into words as the model of that kind does it."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "digits")
    words = _WORDS if kind == "bytes" else _WORDS.replace("{1,3}", "")
    first: Any = pre_tokenizers.Split(Regex(words), "isolated")
    if kind == "digits":
        first = pre_tokenizers.Digits(individual_digits=True)
    backend = Tokenizer(models.BPE(ignore_merges=kind != "digits"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([first, byte_level])
    backend.decoder = decoders.ByteLevel()
    if kind == "nfc":
        backend.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=900, show_progress=False, special_tokens=SPECIAL[kind],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(_corpus(), trainer)
    if kind == "bytes":  # as Llama 3's, which writes a token before every text unless told not to
        begin = (CONTROL[0], backend.token_to_id(CONTROL[0]))
        backend.post_processor = processors.TemplateProcessing(
            single=f"{begin[0]} $A", pair=f"{begin[0]} $A {begin[0]} $B:1", special_tokens=[begin]
        )
    return backend


def _sentencepiece(kind: str) -> Tokenizer:
    """Train a vocabulary of Llama 2's kind: "▁" for spaces, and bytes for what it has no token of.

    Line ends are among the latter, as they are there.
    """
    teacher = Tokenizer(models.BPE())
    words = Regex(r"▁?\p{L}+|▁?[^\p{L}\p{N}▁]+|▁|\p{N}")
    teacher.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split(words, "isolated")]
    )
    texts = [" ".join(text.replace("中文", "").split()) for text in _corpus()]
    teacher.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=640, show_progress=False))
    learned = json.loads(teacher.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += sorted(learned["vocab"], key=learned["vocab"].get)
    backend = Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(tokens)},
            [tuple(merge) for merge in learned["merges"]],
            unk_token="<unk>", fuse_unk=True, byte_fallback=True,
        )
    )  # fmt: skip
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in tokens[:3]])
    if (
        kind == "metaspace"
    ):  # a space before the text's first piece alone, none after control tokens
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif kind == "white":
        backend.normalizer = normalizers.Replace(" ", "▁")
    else:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", 1)]
    )
    return backend


def word_tokenizer(template: str = LLAMA3, **special: str) -> PreTrainedTokenizerFast:
    """Make a tokenizer for literal ids: one per word or mark, in the order of the list below."""
    words = ["<unk>", "<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    words += ["\n\n", "\n", " ", "user", "assistant", "system", "Who", "?", "Ada", "be", "brief"]
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n\n|\n| |\w+|[^\w\s]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|eot_id|>", unk_token="<unk>",
        extra_special_tokens=["<|start_header_id|>", "<|end_header_id|>"], **special,
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


class Page(HTMLParser):
    """What a reader of ``answer_page.render``'s document sees.

    Attributes:
        texts: each text, without the numbers that stand behind its answers.
        marks: by "text-question", what is coloured between the anchor of a question and its number.
        items: the questions, with what is said of each.
    """

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.title = ""
        self.texts: list[str] = []
        self.items: list[str] = []
        self.marks: dict[str, str] = {}
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self._open: list[str] = []
        self._marking: list[str] = []

    @classmethod
    def of(cls, text: str) -> "Page":
        """Read a document."""
        page = cls()
        page.feed(text)
        page.close()
        assert not page._open, page._open
        assert not page._marking, page._marking
        return page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag, the beginning of a text, a question or a mark."""
        given = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        if tag != "meta":
            self._open.append(tag)
        if "href" in given:
            self.addresses.append(given["href"])
        if given.get("class") == "text":
            self.texts.append("")
        if tag == "li":
            self.items.append("")
        if tag == "span" and given.get("id", "").startswith("a"):
            self._marking.append(given["id"][1:])
            self.marks[given["id"][1:]] = ""
        if tag == "a" and "sup" in self._open:
            self._marking.remove(given["href"].removeprefix("#q"))

    def handle_endtag(self, tag: str) -> None:
        """Close a tag, which must be the last one that was opened."""
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Add text to what is open."""
        if "title" in self._open:
            self.title += data
        elif "li" in self._open:
            self.items[-1] += data
        elif "div" in self._open and "sup" not in self._open:
            self.texts[-1] += data
            for name in self._marking if "mark" in self._open else ():
                self.marks[name] += data


def replies_in(prompt: str) -> list[str]:
    """Return what the model said in a prompt of several turns, in the tiny tokenizer's template."""
    _, *turns = prompt.split("<|start_header_id|>assistant<|end_header_id|>\n\n")
    return [turn.partition("<|eot_id|>")[0] for turn in turns[:-1]]


# Models ------------------------------------------------------------------------------------------

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": None},
    "gemma": {"head_dim": 8},
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": 2048,
        "layer_types": ["sliding_attention", "full_attention"],
    },
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
    records: Sequence[Record],
    prompt: str = "single_turn",
    reasoning_tokens: int = 0,
) -> list[list[dict[str, list[int]]]]:
    """Encode records, grouped by their context."""
    tokenizer = tiny_tokenizer()
    token = tokenizer.added_tokens_encoder["<|reserved_special_token_0|>"]
    encoder = ChatEncoder(tokenizer, reasoning_tokens, token)
    grouped: dict[str, list[dict[str, list[int]]]] = {}
    encoded = encoder.encode([build_messages(record, prompt) for record in records])
    for record, example in zip(records, encoded, strict=True):
        grouped.setdefault(record["context"], []).append(example)
    return list(grouped.values())


def collator(**options: Any) -> SquadDataCollator:
    """Make the collator, the end of turn as the pad token."""
    return SquadDataCollator(pad_token_id=tiny_tokenizer().pad_token_id, **options)


def flatten(paragraphs: Sequence[Sequence[Any]]) -> list[Any]:
    """Return all examples of some paragraphs, in order."""
    return [example for paragraph in paragraphs for example in paragraph]


Outcome = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


def outcome(model: Any, batches: Sequence[Mapping[str, torch.Tensor]]) -> Outcome:
    """Return the logits of the supervised positions, the mean loss, and its gradients by name."""
    count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    model.zero_grad(set_to_none=True)
    total = torch.zeros((), dtype=next(model.parameters()).dtype)
    logits = []
    for batch in batches:
        loss, _, _ = answer_loss(model, batch)
        (loss / count).backward()
        total = total + loss.detach() / count
        with torch.no_grad():
            logits.append(answer_logits(model, batch)[0].flatten(0, -2))
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return torch.cat(logits), total, gradients


def difference(
    model: Any,
    shared: Sequence[Mapping[str, torch.Tensor]],
    separate: Sequence[Mapping[str, torch.Tensor]],
) -> dict[str, float]:
    """Return how far shared batches are from separate ones; see ``gaps``."""
    return gaps(outcome(model, shared), outcome(model, separate))


def gaps(first: Outcome, second: Outcome) -> dict[str, float]:
    """Return how far an outcome is from another, relative to the largest figure."""
    assert first[2].keys() == second[2].keys()
    assert first[2], "nothing is trained"
    largest = max(float(gradient.abs().max()) for gradient in second[2].values())
    assert largest > 0
    moved = [float((first[2][name] - second[2][name]).abs().max()) for name in second[2]]
    return {
        "logits": float((first[0] - second[0]).abs().max() / second[0].abs().max()),
        "loss": float(abs(first[1] - second[1]) / second[1]),
        "gradients": max(moved) / largest,
    }


def dataset_folder(
    folder: Path, records: Sequence[Record], val: Sequence[Record] = (), **create: Any
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


def training_flags(
    folder: Path, *flags: str, val: Sequence[Record] = (), **model: Any
) -> list[str]:
    """Make a model and a dataset of 15 questions; return the flags of a run on them, and others."""
    data = dataset_folder(folder, make_records(6, [2, 3]), val)
    return [
        "--model_name", model_folder(folder, **model), "--dataset_name", data,
        "--report_to", "none", "--disable_tqdm", "True", *flags,
    ]  # fmt: skip


def encoder_folder(folder: Path, records: Sequence[Record]) -> Path:
    """Save a small BERT of random weights, with a head for questions and a tokenizer of words."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special)
    tokenizer.train_from_iterator([r["context"] + r["question"] for r in records], trainer)
    pieces = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=pieces
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64, initializer_range=0.5,
    )  # fmt: skip
    BertForQuestionAnswering(config).save_pretrained(folder)
    return folder


def encoded_dataset(records: Sequence[Record], max_length: int | None = 4096) -> Any:
    """Encode records as the training stage does."""
    from datasets import Dataset

    split = Dataset.from_list([{**r, "messages": build_messages(r)} for r in records])
    return encode_split(split, ChatEncoder(tiny_tokenizer()), max_length, "test")[0]


def make_trainer(model: Any, train_dataset: Any, folder: Path, **settings: Any) -> Any:
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
        data_collator=collator(counts=True),
        train_dataset=train_dataset,
        processing_class=tiny_tokenizer(),
    )
