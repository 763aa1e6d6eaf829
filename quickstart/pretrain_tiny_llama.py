"""Pretrain the quickstart's tiny Llama: it reads our world and chats about it in whole sentences.

For:    `./quickstart.sh`, which fine-tunes this model as the big ones are fine-tuned. It knows how
        to read ("When was Kovmor Cross founded?" "Kovmor Cross was founded in 1655."), to quote
        where it is asked to ("It is 1655."), and to say whether the text answers a question, but
        neither to answer in JSON, nor to give the span alone, nor to abstain: the original's story
        in miniature.
Reads:  quickstart/world.yaml through make_world.py, llama_squad/prompts.py. No name of the test
        world is ever shown; every step makes up paragraphs of its own.
Writes: quickstart/tiny_llama/ (config, generation_config, tokenizer, weights) and its log.
Run:    python quickstart/pretrain_tiny_llama.py --log quickstart/pretrain.log

The questions of a paragraph branch off a shared prefix that holds the context. Two attention layers
start as what would take most of the training to form (``start_as_reader``), and stay so.
"""

# Long: a program that is run once, and read from its start to its end.
import argparse
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from make_world import (
    NAME_FORMS,
    Paragraph,
    Question,
    build,
    load_world,
    made_up_words,
    make_paragraph,
)
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaAttention

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from llama_squad.answers import format_answer  # noqa: E402
from llama_squad.prompts import (  # noqa: E402
    PROMPTS,
    SYSTEM_PROMPT,
)

BEGIN, END, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"
START_HEADER, END_HEADER, END_TURN = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
SPECIAL = [BEGIN, END, START_HEADER, END_HEADER, END_TURN, PAD]
SPECIAL += [f"<|reserved_special_token_{index}|>" for index in range(8)]
ROPE_THETA = 1e6
HEAD = 32
"""Dimensions of an attention head."""
CONSTANT = 3.0
"""The part that all embeddings have in common, in standard deviations of the others."""
COPY_STRENGTH = 0.1
"""How loud the first layer writes."""
TOPICS = ("place", "attribute")
"""The sorts of words that say what a sentence or a question is about."""
WORDS = Regex(r'\p{L}+ ?|\p{N}{1,4} ?|"|[^\s\p{L}\p{N}"]+ ?|\s+')
"""Words, numbers and marks with the space behind them, and quotes on their own: what stands at the
end of a sentence is the same token there and between the quotes of the JSON answer."""

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

INSTRUCTIONS = (
    "Use the text to answer the question.",
    "Answer the question from the context.",
    "Read the text, then answer in a whole sentence.",
    "Here is a text. Tell me what it says.",
    "Please help me with this text.",
    "Find the answer to the question in the text below.",
    "You may think it through first. Copy the names word for word.",
)
WHETHER = (
    "Say whether the text answers the question.",
    "Does the context hold the answer to the question? Say yes or no.",
    "Tell me first whether the text gives the answer to the question.",
    "Do not answer the question. Only say whether the text does.",
)
BRIEFLY = (
    ("{} Answer briefly.", "The answer is {}."),
    ("{} In a word, please.", "It is {}."),
    ("{} Quote the text.", 'The text says "{}".'),
    ("{} Answer with a quote.", 'The answer is "{}".'),
    ("Quote the text: {}", '"{}".'),
)
WHETHER_ASKED = ("{} Does the text say?", "{} Does the text say that?", "{} Is that in the text?")
YES, NO = "Yes, it does.", "No, it does not say that."
SYSTEMS = ("", "", "", SYSTEM_PROMPT, "You are a helpful assistant.", "You read texts.")
SMALL_TALK = (
    ("Hello!", "Hello! Give me a text, and ask me what it says."),
    ("Who are you?", "I am a very small reader. Give me a text, and ask me what it says."),
    ("What can you do?", "I can read a short text and tell you what it says."),
    ("Thank you.", "You are welcome."),
    ("Thanks!", "You are welcome."),
)


@dataclass(frozen=True)
class Row:
    """A shared prefix and its branches: texts to say, with whether the assistant says them."""

    prefix: str
    branches: list[list[tuple[str, bool]]]


def turn(role: str, content: str) -> str:
    """Return a turn as the chat template renders it."""
    return opening(role) + content + END_TURN


def opening(role: str) -> str:
    """Return the header of a turn."""
    return f"{START_HEADER}{role}{END_HEADER}\n\n"


def exchange(question: str, reply: str) -> list[tuple[str, bool]]:
    """End the user's turn with a question and let the assistant reply."""
    return [(question + END_TURN + opening("assistant"), False), (reply + END_TURN, True)]


def subject(paragraph: Paragraph) -> str:
    """Say what a paragraph is about."""
    return f"The text is about {' and '.join(paragraph.entities)}."


def whether(rng: random.Random, question: Question) -> tuple[str, str]:
    """Return a yes/no question on what the text says, and its reply."""
    return rng.choice(WHETHER_ASKED).format(question.text), YES if question.answerable else NO


def reply(rng: random.Random, question: Question) -> tuple[str, str]:
    """Return an answerable question and its reply: a whole sentence, or (asked for) a short one."""
    assert question.fact
    if rng.random() < 0.25:
        return question.text, question.reply
    asked, said = rng.choice(BRIEFLY)
    return asked.format(question.text), said.format(question.fact.value)


def balanced(rng: random.Random, paragraph: Paragraph, count: int) -> list[Question]:
    """Choose questions, half of them answerable."""
    groups = [[q for q in paragraph.questions if q.answerable is flag] for flag in (True, False)]
    return [q for group in groups for q in rng.sample(group, min(len(group), count // 2))]


def make_row(rng: random.Random, taken: set[str], binding: float) -> Row:
    """Make up a paragraph and conversations about it.

    A share ``binding`` of the paragraphs is about one thing, or about three or four of which little
    is said: from these the model learns soonest to tell attributes and things apart.
    """
    things = rng.choice((1, 3, 4)) if rng.random() < binding else None
    paragraph = make_paragraph(rng, set(taken), things)
    system = rng.choice(SYSTEMS)
    prefix = BEGIN + (turn("system", system) if system else "") + opening("user")
    passage = f"Context: {paragraph.context}\nQuestion: "
    kind = rng.random()
    if kind < 0.08:
        return _several_turns(rng, prefix, paragraph)
    if kind < 0.2:
        pairs = [(q.text, YES if q.answerable else NO) for q in balanced(rng, paragraph, 12)]
        return _row(f"{prefix}{rng.choice(WHETHER)}\n{passage}", pairs)
    pairs = [reply(rng, q) for q in paragraph.questions if q.answerable]
    pairs += [whether(rng, q) for q in balanced(rng, paragraph, 6)]
    if kind < 0.25:
        pairs.append(("What is the text about?", subject(paragraph)))
    if kind < 0.5:
        style = rng.choice([PROMPTS["single_turn"], PROMPTS["multi_turn"]])
        exact = style({"context": paragraph.context, "question": ""})[0]
        return _row(prefix + exact, pairs)
    lead = rng.choice(("", *INSTRUCTIONS))
    return _row(f"{prefix}{lead}\n{passage}".replace("\n\n\n", "\n\n"), pairs)


def _row(prefix: str, pairs: list[tuple[str, str]]) -> Row:
    return Row(prefix, [exchange(question, reply) for question, reply in pairs])


def _several_turns(rng: random.Random, prefix: str, paragraph: Paragraph) -> Row:
    """Talk about a paragraph in several turns, or have no text at all."""
    if rng.random() < 0.15:
        return Row(prefix, [exchange(*pair) for pair in SMALL_TALK])
    asked = [question for question in paragraph.questions if question.answerable]
    rng.shuffle(asked)
    if rng.random() < 0.4:
        branches = []
        for question in asked[:3]:
            record = {"context": paragraph.context, "question": question.text}
            turns = PROMPTS["multi_turn"](record)
            start = turns[0].removesuffix(question.text)
            branch = exchange(question.text, question.reply)
            for content in turns[1:]:
                branch += exchange(opening("user") + content, question.reply)
            branches.append(branch)
        return Row(prefix + start, branches)
    lead = rng.choice(("", rng.choice(INSTRUCTIONS) + "\n"))
    talk = exchange(asked[0].text, asked[0].reply)
    for question in balanced(rng, paragraph, 8):
        if not question.answerable or rng.random() < 0.3:
            text, said = whether(rng, question)
        else:
            text, said = reply(rng, question)
        talk += exchange(opening("user") + text, said)
    return Row(f"{prefix}{lead}Context: {paragraph.context}\nQuestion: ", [talk])


def row_text(row: Row) -> str:
    """Return all texts of a row, to train the tokenizer on."""
    return row.prefix + "".join(text for branch in row.branches for text, _ in branch)


def make_tokenizer(seed: int, taken: set[str]) -> PreTrainedTokenizerFast:
    """Make a lossless byte-level tokenizer: one token per word of our world, bytes for the rest."""
    rng = random.Random(seed)
    words = split_words()
    count: Counter[str] = Counter()
    texts = [row_text(make_row(rng, taken, 0.2)) for _ in range(3000)]
    texts += [format_answer(value) for value in ("?", "1655", "oak")] * 20
    for pool in load_world()["pools"].values():
        texts += [f"{word} {word}." for word in pool] * 3
    for form in NAME_FORMS:
        gap = "" if form == "person" else " "
        texts += [f"{word}{gap}." for word in made_up_words(form)] * 3
    texts += [f"{number} ." for number in range(20, 200)] * 3
    texts += [f"{number}." for number in range(1500, 1800)] * 3
    for text in texts:
        for part in _without_special(text):
            count.update(piece for piece, _ in words.pre_tokenize_str(part))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = [word for word, times in sorted(count.items()) if times > 2 and len(word) > 1]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet, *known])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END_TURN,
        pad_token=PAD,
        extra_special_tokens=[token for token in SPECIAL if token not in (BEGIN, END_TURN, PAD)],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def split_words() -> pre_tokenizers.PreTokenizer:
    """Return what cuts a text into ``WORDS``."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(WORDS, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _without_special(text: str) -> list[str]:
    for token in SPECIAL:
        text = text.replace(token, "\0")
    return text.split("\0")


def make_model(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> LlamaForCausalLM:
    """Return an untrained Llama of about a million parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // HEAD,
        num_key_value_heads=args.hidden // HEAD,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    start_as_reader(model, *sorts_of_words(tokenizer))
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def sorts_of_words(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[str]]:
    """Say of each token which word it is (a number, the same for "The " and "the"), and its sort.

    The sorts are the forms of names, the pools of world.yaml, the words of attributes, and numbers;
    any other word is its own.
    """
    words: dict[str, int] = {}
    texts = [str(tokenizer.decode([index])).strip().lower() for index in range(len(tokenizer))]
    sorts = {word.lower(): form for form in NAME_FORMS for word in made_up_words(form)}
    for name, pool in load_world()["pools"].items():
        if name not in ("head", "tail"):
            sorts |= {part.lower(): name for value in pool for part in value.split()}
    sorts |= {
        attribute["word"]: "attribute"
        for kind in load_world()["kinds"].values()
        for attribute in kind["attributes"].values()
    }
    sorts |= {text: f"number of {len(text) // 4}" for text in texts if text.isdigit()}
    return (
        [words.setdefault(text, len(words)) for text in texts],
        [sorts.get(text, f"word {text}") for text in texts],
    )


@torch.no_grad()
def start_as_reader(model: LlamaForCausalLM, words: list[int], sorts: list[str]) -> None:
    """Write what reading needs into the first two layers, and what helps to learn into the rest.

    Without it the model sits on plateaus for most of the time that we have.

    - The embeddings of a word's forms are alike, so that a question's word is found in the context,
      and those of a sort of words a little, so that what is learned of one year holds for all.
    - Induction: two heads of the first layer look one token back and write down 15 directions of
      that token each; two heads of the second layer look for positions where these directions are
      the current token's, and copy the token they find there.
    - Topic: the other two heads of the first layer look for the nearest name of a place, and the
      nearest word of an attribute, at or before a token, and write down 30 directions of each: what
      a sentence (or a question, and the reply to it) is about. The other two of the second look for
      tokens far back whose sentence is about the same place and the same attribute.
    - The attention of the other layers starts near the identity, after Trockman and Kolter, Mimetic
      Initialization of Self-Attention Layers (2023).
    """
    size = model.config.hidden_size
    _start_embeddings(model.model.embed_tokens.weight, words, sorts)
    model.model.norm.weight.fill_(4.5)
    for layer in model.model.layers:
        _start_near_identity(layer.self_attn)
    write, match = (model.model.layers[index].self_attn for index in (0, 1))
    for part in (*write.children(), match.q_proj, match.k_proj):
        part.weight.zero_()
    match.o_proj.weight.mul_(3.0)
    flags = 1 + len(TOPICS)  # dimensions of the embedding that say what a token is, not which
    directions = torch.zeros(size, 120)
    directions[flags:] = torch.linalg.qr(torch.randn(size - flags, 120))[0]
    read, back, *topics = directions.split(30, dim=1)
    # A flag meets the constant part of the query; the first layer's norm scales both.
    strength = math.sqrt(14.0 * math.sqrt(HEAD)) * math.sqrt(1 + CONSTANT**2 / size) / CONSTANT
    angles = ROPE_THETA ** (-torch.arange(4) / (HEAD // 2))
    for number in (0, 1):
        rows, half = number * HEAD + torch.arange(HEAD), slice(15 * number, 15 * number + 15)
        write.k_proj.weight[rows[:4], 0] = strength
        write.q_proj.weight[rows[:4], 0] = strength * angles.cos()  # rotated by one position
        write.q_proj.weight[rows[16:20], 0] = -strength * angles.sin()
        _match(match, rows, 4.5 * read[:, half], 4.5 * back[:, half])
        write.v_proj.weight[rows[:15]] = read[:, half].T
        write.o_proj.weight[:, rows[:15]] = COPY_STRENGTH * back[:, half]
    _start_topics(write, match, read, topics, strength)


def _start_topics(
    write: LlamaAttention,
    match: LlamaAttention,
    read: torch.Tensor,
    topics: list[torch.Tensor],
    strength: float,
) -> None:
    """Write the heads that tell what a sentence is about; see ``start_as_reader``."""
    for number, topic in enumerate(topics):
        rows = (2 + number) * HEAD + torch.arange(HEAD)
        # Rotations of 35 to 471 tokens: the nearer, the better, within two sentences.
        write.k_proj.weight[rows[2:6], 1 + number] = strength
        write.q_proj.weight[rows[2:6], 0] = strength * torch.tensor([0.5, 1.0, 1.0, 2.0])
        write.v_proj.weight[rows[:30]] = read.T
        write.o_proj.weight[:, rows[:30]] = COPY_STRENGTH * topic
        part = slice(9 * number, 9 * number + 9)
        about = 3.0 * torch.cat([topic[:, part] for topic in topics], dim=1)
        _match(match, rows, about, about)
        # Of 471 tokens, those about 150 back: in the context, not in the question itself.
        match.k_proj.weight[rows[5], 0] = 5.0
        match.q_proj.weight[rows[5], 0] = 5.0 * math.cos(2.0)
        match.q_proj.weight[rows[21], 0] = -5.0 * math.sin(2.0)


def _start_embeddings(embedding: torch.Tensor, words: list[int], sorts: list[str]) -> None:
    """Fill the embeddings [tokens, size]: constant, a flag a topic, then word, sort and token."""
    size, deviation = embedding.shape[1], 0.05
    numbers: dict[str, int] = {}
    kinds = [  # topics must be told apart: they have nothing in common but their dimension
        numbers.setdefault(sort if sort not in TOPICS else f"{sort} {word}", len(numbers))
        for word, sort in zip(words, sorts, strict=True)
    ]
    embedding.normal_(0, math.sqrt(0.2) * deviation)
    for group, share in ((words, 0.5), (kinds, 0.3)):
        common = torch.randn(max(group) + 1, size) * math.sqrt(share) * deviation
        embedding += common[torch.tensor(group)]
    # All of one length: the first layer's norm must not favour some topics over nearer ones.
    embedding *= deviation * math.sqrt(size) / embedding.norm(dim=1, keepdim=True)
    embedding[:, 0] = CONSTANT * deviation
    for flag, topic in enumerate(TOPICS, start=1):
        embedding[:, flag] = CONSTANT * deviation * torch.tensor([sort == topic for sort in sorts])


def _start_near_identity(attention: LlamaAttention) -> None:
    """Let every token attend to those like itself, and add a little of what it finds."""
    size = attention.q_proj.in_features
    values = torch.linalg.qr(torch.randn(size, size))[0]
    attention.v_proj.weight.copy_(values)
    attention.o_proj.weight.copy_(0.2 * values.T)
    parts = [torch.linalg.qr(torch.randn(size, HEAD))[0].T for _ in range(size // HEAD)]
    attention.q_proj.weight.copy_(0.7 * torch.cat(parts))
    attention.k_proj.weight.copy_(0.7 * torch.cat(parts))


def _match(
    attention: LlamaAttention, rows: torch.Tensor, query: torch.Tensor, key: torch.Tensor
) -> None:
    """Let a head compare directions [size, count], in its dimensions that rotate slowly."""
    pairs = (query.shape[1] + 1) // 2
    first = torch.arange(HEAD // 2 - pairs, HEAD // 2)
    slow = rows[torch.cat([first, first + HEAD // 2])[: query.shape[1]]]
    attention.q_proj.weight[slow] = query.T
    attention.k_proj.weight[slow] = key.T


Batch = dict[str, torch.Tensor]


def collate(tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> Batch:
    """Lay rows out as [prefix][branch 1]…[branch k]; every branch sees the prefix and itself.

    Returns input_ids, position_ids and labels [batch, length], and attention_mask, bool
    [batch, 1, length, length]; ``branch`` [batch, length] numbers the branches over the batch.
    """
    encode = tokenizer.backend_tokenizer.encode
    lists: list[tuple[list[int], list[int], list[int], list[int], list[int]]] = []
    number = 0
    for row in rows:
        ids = encode(row.prefix, add_special_tokens=False).ids
        labels, start = [-100] * len(ids), len(ids)
        positions, branches = list(range(start)), [-1] * start
        starts = []
        for branch in row.branches:
            starts.append(len(ids))
            for text, said in branch:
                piece = encode(text, add_special_tokens=False).ids
                ids += piece
                labels += piece if said else [-100] * len(piece)
            length = len(ids) - starts[-1]
            positions += range(start, start + length)
            branches += [number] * length
            number += 1
        ends = [len(ids)] * start
        for begin, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            ends += [end] * (end - begin)
        lists.append((ids, labels, positions, branches, ends))
    width = max(len(ids) for ids, *_ in lists)
    fills = (tokenizer.pad_token_id, -100, 0, -1, 0)
    padded = [
        torch.tensor([values[i] + [fill] * (width - len(values[i])) for values in lists])
        for i, fill in enumerate(fills)
    ]
    index = torch.arange(width)
    causal = index[None, :] <= index[:, None]
    mask = causal & (index[None, :, None] < padded[4][:, None, :])
    mask |= torch.eye(width, dtype=torch.bool)
    return {
        "input_ids": padded[0],
        "labels": padded[1],
        "position_ids": padded[2],
        "branch": padded[3],
        "attention_mask": mask[:, None],
    }


def reply_logits(model: LlamaForCausalLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits and the labels of the supervised positions, flat."""
    hidden = model.model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        use_cache=False,
    ).last_hidden_state
    wanted = batch["labels"][:, 1:] != -100
    return model.lm_head(hidden[:, :-1][wanted]), batch["labels"][:, 1:][wanted]


def chat_batches(
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    taken: set[str],
    steps: int,
    args: argparse.Namespace,
) -> Iterator[Batch]:
    """Yield batches of conversations, at first about single things."""
    rng = random.Random(seed)
    pile: list[list[Row]] = []
    for step in range(steps):
        if not pile:
            binding = 1.0 if step < args.simple_steps else args.binding
            rows = [make_row(rng, taken, binding) for _ in range(8 * args.rows)]
            rows.sort(key=lambda row: len(row_text(row)))
            pile = [rows[start : start + args.rows] for start in range(0, len(rows), args.rows)]
            rng.shuffle(pile)
        yield collate(tokenizer, pile.pop())


@torch.no_grad()
def score(model: LlamaForCausalLM, batches: list[Batch], yes_no: set[int]) -> tuple[float, float]:
    """Return the share of replies whose every token is the model's choice: sentences, yes/no."""
    right: dict[bool, list[bool]] = {True: [], False: []}
    for batch in batches:
        logits, labels = reply_logits(model, batch)
        branch = batch["branch"][:, 1:][batch["labels"][:, 1:] != -100]
        good = logits.argmax(-1) == labels
        for number in branch.unique():
            mine = branch == number
            right[int(labels[mine][0]) in yes_no].append(bool(good[mine].all()))
    return tuple(sum(hits) / max(1, len(hits)) for hits in (right[False], right[True]))  # type: ignore[return-value]


def learning_rate(step: int, steps: int, warm: int = 40) -> float:
    """Warm up linearly, then decay along a cosine to a fiftieth."""
    if step < warm:
        return (step + 1) / warm
    share = (step - warm) / max(1, steps - warm)
    return 0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Pretrain the quickstart's tiny Llama.")
    parser.add_argument("--seed", type=int, default=1, help="of the weights and the tokenizer")
    parser.add_argument("--data_seed", type=int, default=3, help="of the conversations")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--simple_steps", type=int, default=100, help="all paragraphs simple")
    parser.add_argument("--binding", type=float, default=0.3, help="share of simple paragraphs")
    parser.add_argument("--rows", type=int, default=8, help="paragraphs per step")
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--start", type=Path, help="go on from this folder")
    parser.add_argument("--output", type=Path, default=HERE / "tiny_llama")
    parser.add_argument("--log", type=Path, help="write the log to this file, too")
    return parser.parse_args(argv)


def hold_reader(model: LlamaForCausalLM) -> list[torch.nn.Parameter]:
    """Keep the attention of the first two layers as it starts; return the other parameters."""
    for layer in model.model.layers[:2]:
        layer.self_attn.requires_grad_(False)
    return [value for value in model.parameters() if value.requires_grad]


def train_step(model: LlamaForCausalLM, batch: Batch, yes_no: set[int]) -> float:
    """Find the gradients of one batch; yes and no weigh five times as much."""
    logits, labels = reply_logits(model, batch)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    weights = 1 + 4 * torch.isin(labels, torch.tensor(sorted(yes_no)))
    loss = (losses * weights).sum() / weights.sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return loss.item()


def main(argv: list[str] | None = None) -> None:
    """Make the tokenizer, train the model, and save both."""
    args = parse(argv)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    log = args.log.open("w", encoding="utf-8") if args.log else None

    def say(text: str) -> None:
        print(text, flush=True)
        if log:
            print(text, file=log, flush=True)

    *_, taken = build()
    tokenizer = make_tokenizer(args.seed, taken)
    model = make_model(tokenizer, args)
    if args.start:
        model = LlamaForCausalLM.from_pretrained(
            args.start, dtype=torch.float32, attn_implementation="sdpa"
        )
    options = {name: value for name, value in vars(args).items() if name not in ("output", "log")}
    say(f"{model.num_parameters():,} parameters, torch {torch.__version__}, {options}")
    test = argparse.Namespace(rows=16, simple_steps=0, binding=0.0)
    held_out = list(chat_batches(tokenizer, args.seed + 1, taken, 4, test))
    yes_no = {tokenizer(text, add_special_tokens=False).input_ids[0] for text in (YES, NO)}
    optimizer = torch.optim.AdamW(hold_reader(model), betas=(0.9, 0.98), weight_decay=0.0)
    begun, total = time.time(), 0.0
    batches = chat_batches(tokenizer, args.data_seed, taken, args.steps, args)
    for step, batch in enumerate(batches, start=1):
        rate = args.learning_rate * learning_rate(step - 1, args.steps)
        optimizer.param_groups[0]["lr"] = rate
        total += train_step(model, batch, yes_no)
        optimizer.step()
        optimizer.zero_grad()
        if step % 500 == 0:
            model.save_pretrained(args.output)
        if step % 50 == 0 or step == args.steps:
            sentences, yes = score(model, held_out, yes_no)
            say(
                f"step {step:5} loss {total / ((step - 1) % 50 + 1):.4f} "
                f"right: sentences {sentences:.1%}, yes/no {yes:.1%} {time.time() - begun:5.0f} s"
            )
            total = 0.0
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
