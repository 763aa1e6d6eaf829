"""Adapters that act from some token of a task on: exact in training, decoding and chat."""

import copy
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    TOKENIZERS,
    collator,
    difference,
    flatten,
    gaps,
    load_encoder,
    make_records,
    outcome,
    replies_in,
    tiny_model,
    tiny_tokenizer,
    training_flags,
)
from peft import LoraConfig, get_peft_model
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import train_llama_squad
from llama_squad import forgetting, modeling, supervised, weights
from llama_squad.activation import ADAPTER_MASK, activate, activation_of
from llama_squad.arguments import AppArguments, ModelArguments
from llama_squad.config import RUN_CONFIG
from llama_squad.decoding.cache import Branch, TokenTree
from llama_squad.decoding.chat import ChatSession
from llama_squad.decoding.spans import span_vocabulary
from llama_squad.encoding import ChatEncoder
from llama_squad.merging import merge
from llama_squad.predictors.local import LocalModel
from llama_squad.prompts import PROMPTS, ActsFrom, adapter_start, build_messages
from llama_squad.reader import Reader
from llama_squad.training.setup import check_shared_contexts
from llama_squad.training.trainer import answer_loss

RECORDS = make_records(3, [3, 1, 2])
WHERE: list[ActsFrom] = ["context", "question", "reply"]
CHAT = [{"role": "user", "content": "Hello, who are you? Question: who met Ada?"}]


def activated(
    where: ActsFrom,
    architecture: str = "llama",
    dtype: torch.dtype = torch.float32,
    base: Any = None,
) -> Any:
    """Make a model with an adapter, no matrix of it zero."""
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    model: Any = get_peft_model(base or tiny_model(architecture, dtype), config)
    activate(model, where)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model.eval()


def paragraphs(
    where: ActsFrom, prompt: str = "single_turn", records: Sequence[dict] = RECORDS
) -> list[list[dict[str, Any]]]:
    """Encode records, grouped by their context, with where the adapter begins to act."""
    messages = [build_messages(record, prompt) for record in records]
    pairs = zip(messages, records, strict=True)
    places = [adapter_start(m, r, prompt, where) for m, r in pairs]
    grouped: dict[str, list[dict[str, Any]]] = {}
    examples = ChatEncoder(tiny_tokenizer()).encode(messages, places)
    for record, example in zip(records, examples, strict=True):
        grouped.setdefault(record["context"], []).append(example)
    return list(grouped.values())


@torch.no_grad()
def in_two_passes(model: Any, ids: Sequence[int], start: int) -> torch.Tensor:
    """Return all logits, without any mask: the base's pass to ``start``, the adapter's from there.

    The adapter's layers are PEFT's own; the mask of the second pass names all of its tokens.
    """
    rows = torch.tensor([list(ids)])
    with model.disable_adapter():
        first = model(rows[:, :start], use_cache=True)
    everything = torch.ones(1, len(ids) - start, dtype=torch.bool)
    rest = model(rows[:, start:], past_key_values=first.past_key_values, adapter_mask=everything)
    return torch.cat([first.logits, rest.logits], dim=1)[0]


# Where it begins -------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(("name", "template", "end"), TOKENIZERS)
def test_the_first_token(name: str, template: str, end: str, prompt: str) -> None:
    encoder = load_encoder(name, template)
    record = {**RECORDS[0], "context": 'He said: "Question: Who?"\nQuestion: none.\n'}
    records = [{**record, "question": q} for q in ("  Who met Ada?", "When?", "\u00c9 ou?")]
    messages = [build_messages(r, prompt, system_prompt="Be brief.") for r in records]
    for where in WHERE:
        places = [
            adapter_start(m, r, prompt, where) for m, r in zip(messages, records, strict=True)
        ]
        examples = encoder.encode(messages, places)
        for example, record, place in zip(examples, records, places, strict=True):
            ids, start = example["input_ids"], example["adapter_from"]
            before, after = (
                str(encoder.tokenizer.decode(part)) for part in (ids[:start], ids[start:])
            )
            if where == "question":
                if not prompt.startswith("question"):
                    assert before.rstrip().endswith("Question: none.")
                assert ("Question: none." in before) == (not prompt.startswith("question"))
                assert after.lstrip().startswith(f"Question: {record['question'].strip()}")
            elif where == "context":
                first = "Question: " if prompt.startswith("question") else 'Context: He said: "'
                assert after.lstrip().startswith(first)
                assert "He said" not in before and record["question"] not in before
            else:
                assert re.search("assistant|INST|<start_of_turn>model", after)
                assert before.rstrip().endswith(PROMPTS[prompt](record)[-1].split()[-1])
            first_label = next(i for i, label in enumerate(example["labels"]) if label != -100)
            assert start < first_label
            turns = [m for m in build_messages(record, prompt, "Be brief.", answer=False)]
            found = encoder.encode_activated_prompts([turns], [place])
            assert found == [(ids[:first_label], start)]
        if where != "reply":
            assert len({example["adapter_from"] for example in examples}) == 1


@pytest.mark.parametrize("where", ["context", "question"])
def test_a_style_without_the_question_is_refused(
    where: ActsFrom, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROMPTS, "none", lambda record: ["Context: " + record["context"]])
    with pytest.raises(ValueError, match="'none' does not hold the question"):
        adapter_start(build_messages(RECORDS[0], "none"), RECORDS[0], "none", where)
    with pytest.raises(ValueError, match="not of the prompt style 'single_turn'"):
        adapter_start(build_messages(RECORDS[0], "none"), RECORDS[0], "single_turn", where)


# Training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "phi3"])
def test_rows_equal_separate_examples(
    architecture: str, where: ActsFrom, checkpointing: bool
) -> None:
    model = activated(where, architecture)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    groups = paragraphs(where)
    separate = [collator()([example]) for example in flatten(groups)]
    ways = [
        [collator()([{"paragraphs": groups}])],
        [collator()([{"paragraphs": groups[:2]}, {"paragraphs": groups[2:]}])],
        [collator()(flatten(groups))],  # padded
    ]
    expected = outcome(model, separate)
    for batches in ways:
        assert max(gaps(outcome(model, batches), expected).values()) < 1e-5


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("where", WHERE)
def test_rows_equal_two_passes(where: ActsFrom, prompt: str) -> None:
    model = activated(where)
    for example in flatten(paragraphs(where, prompt)):
        ids, start = example["input_ids"], example["adapter_from"]
        batch = collator()([example])
        del batch["labels"]
        assert batch[ADAPTER_MASK].sum() == len(ids) - start > 0
        found = model(**batch).logits[0]
        expected = in_two_passes(model, ids, start)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        plain = model(**batch | {ADAPTER_MASK: torch.ones(1, len(ids), dtype=torch.bool)})
        assert (plain.logits[0] - expected).abs().max() > 1e-2, "plain LoRA would do"
        with model.disable_adapter():
            assert (model(**batch).logits[0] - expected).abs().max() > 1e-2, "the base would do"


@pytest.mark.parametrize("base", ["llama", "windows", "ddp"])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("where", WHERE)
def test_the_bases_tokens_take_no_gradient(
    where: ActsFrom, rows: int, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_tree import tree_model

    windows = tree_model("gemma3_text", sliding_window=24) if base == "windows" else None
    model = activated(where, base=windows).train()
    groups = paragraphs(where)
    batch = collator()([{"paragraphs": groups}, {"paragraphs": groups[:2]}][:rows])
    own = int((~batch[ADAPTER_MASK]).sum(1).min())  # in two rows the shorter one's pads are others
    passes, scored = [], []
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: passes.append((args[0].shape[1], torch.is_grad_enabled()))
    )
    model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: scored.append(args[0].shape[:-1].numel())
    )
    monkeypatch.setattr(supervised, "runs_base_first", lambda *_: False)
    expected = outcome(model, [batch])
    length = batch["input_ids"].shape[1]
    assert passes == [(length, True), (length, False)]
    monkeypatch.undo()
    passes.clear()
    scored.clear()
    if base == "ddp":
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        called = DistributedDataParallel(model) if base == "ddp" else model
        loss, _, count = answer_loss(called, batch)
        model.zero_grad(set_to_none=True)
        (loss / count).backward()
    finally:
        if base == "ddp":
            distributed.destroy_process_group()
    assert passes == [(own, False), (length - own, True)]
    assert scored == [0, count]
    torch.testing.assert_close((loss / count).detach(), expected[1])
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(gradients, expected[2], atol=1e-5, rtol=1e-4)


def test_an_adapter_of_experts_is_refused() -> None:
    """PEFT adds to their weights, which a context's tokens go through as well."""
    base = tiny_model("qwen3_moe", num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=modules)
    activate(get_peft_model(copy.deepcopy(base), config), "question")
    with pytest.raises(ValueError, match=r"mlp\.\S+ cannot be .* other --lora_target_modules"):
        activated("question", base=base)


def test_peft_s_own_kind_is_refused(tmp_path: Path) -> None:
    """It finds its tokens anew in each pass, and so not after the first, nor in a tree."""
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[7, 8]
    )
    base = str(tmp_path / "base")
    tiny_model().save_pretrained(base)
    model = get_peft_model(modeling.load_model(ModelArguments(model_name=base)), config)
    model.save_pretrained(str(tmp_path / "alora"))
    with pytest.raises(ValueError, match="activated LoRA of PEFT's own kind"):
        modeling.load_model(ModelArguments(model_name=base), adapter_name=str(tmp_path / "alora"))


GEMMA4: dict[str, Any] = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "head_dim": 8, "sliding_window": 512,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 640, "enable_moe_block": False,
}  # fmt: skip


def test_gemma_4_s_shared_layers_keep_the_mask() -> None:
    """To a number of logits it cuts what they read, which an adapter's mask then does not fit."""
    model = activated("question", base=tiny_model("gemma4_text", **GEMMA4))
    tree = TokenTree(model)
    stem, ids = Branch(None, list(range(20, 40)), wanted=0, adapter_from=10), list(range(40, 50))
    branches = [Branch(stem, ids), Branch(stem, ids[::-1])]
    together = tree.extend([[stem, *branches]])
    for branch, logits in zip(branches, together, strict=True):
        alone = in_two_passes(model, [*stem.tokens, *branch.tokens], 10)[-1]
        assert torch.allclose(logits, alone, atol=1e-4)


def test_examples_that_begin_elsewhere_share_less() -> None:
    # one paragraph whose examples the adapter treats otherwise, from before their ids part
    groups = paragraphs("question")[:1]
    moved = [{**e, "adapter_from": e["adapter_from"] - i} for i, e in enumerate(groups[0])]
    separate = [collator()([example]) for example in moved]
    found = difference(activated("question"), [collator()([{"paragraphs": [moved]}])], separate)
    assert max(found.values()) < 1e-5


def test_the_check_of_shared_contexts_knows_it() -> None:
    model, groups = activated("question"), paragraphs("question")
    assert check_shared_contexts(model, collator(), {"paragraphs": groups}) == ""
    for example in groups[-1]:
        example["adapter_from"] += 3  # of the last example alone: its sequence by itself differs
    collate = collator()
    row = collate([{"paragraphs": groups}])
    row[ADAPTER_MASK] = torch.zeros_like(row[ADAPTER_MASK])
    why = check_shared_contexts(model, lambda rows: row, {"paragraphs": groups})  # type: ignore[arg-type]
    assert "gives other logits" in why


# Evaluation ------------------------------------------------------------------------------------


def score(model: Any, prompt: Sequence[int], reply: Sequence[int], start: int) -> list[float]:
    """Return the log-probability of each of a reply's tokens, in two passes."""
    logits = in_two_passes(model, [*prompt, *reply], start)[len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(reply)[:, None]).flatten().tolist()


@pytest.mark.parametrize("where", WHERE)
def test_evaluation_equals_two_passes(where: ActsFrom, monkeypatch: pytest.MonkeyPatch) -> None:
    model, encoder = activated(where), ChatEncoder(tiny_tokenizer())
    places = [adapter_start(build_messages(r), r, "single_turn", where) for r in RECORDS]
    examples = encoder.encode([build_messages(r) for r in RECORDS], places)
    batch = [RECORDS[:3], RECORDS[3:4], RECORDS[4:]]
    for alone in (1024, 8):  # the context in the questions' pass, and in one of its own
        monkeypatch.setattr("llama_squad.decoding.batch.STEM_ALONE", alone)
        for options in ({"decoding": "free", "max_new_tokens": 6}, {"decoding": "span"}):
            local = LocalModel(model, encoder, **options)
            for example, prediction in zip(examples, local.answer(batch), strict=True):
                reply = prediction.reply
                first = next(i for i, label in enumerate(example["labels"]) if label != -100)
                prompt, start = example["input_ids"][:first], example["adapter_from"]
                scores = score(model, prompt, reply.token_ids, start)
                if options["decoding"] == "free":
                    whole = [*prompt, *reply.token_ids]
                    logits = in_two_passes(model, whole, start)[first - 1 : -1]
                    assert reply.token_ids == logits.argmax(-1).tolist()
                    assert reply.score == pytest.approx(sum(scores), abs=1e-4)
                else:
                    header = len(span_vocabulary(encoder).header)
                    assert reply.score == pytest.approx(sum(scores[header:]), abs=1e-4)


def test_a_batch_in_halves_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, encoder = activated("question"), ChatEncoder(tiny_tokenizer())
    local = LocalModel(model, encoder)
    whole = [p.reply for p in local.answer([RECORDS[:3]])]
    monkeypatch.setattr("llama_squad.decoding.generator.free_memory", lambda _: 0.0)
    halves = [p.reply for p in local.answer([RECORDS[:3]])]
    assert [r.completion for r in halves] == [r.completion for r in whole]
    assert [r.score for r in halves] == pytest.approx([r.score for r in whole], abs=1e-4)


@pytest.mark.parametrize("where", WHERE)
def test_turns_before_the_reply(where: ActsFrom, monkeypatch: pytest.MonkeyPatch) -> None:
    model, encoder = activated(where), ChatEncoder(tiny_tokenizer())
    monkeypatch.setattr("llama_squad.predictors.local.TURN_TOKENS", 12)
    ours, base = (
        LocalModel(m, encoder, prompt="multi_turn", decoding="free", max_new_tokens=4)
        for m in (model, tiny_model())
    )
    said, expected = (
        replies_in(local.answer([RECORDS[:1]])[0].prompt_text) for local in (ours, base)
    )
    assert len(said) == 2
    assert all(said)
    # up to the reply all is the base's; from the context or the question on it is not
    assert (said == expected) is (where == "reply")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", WHERE)
def test_what_stands_before_has_the_bases_cache(where: ActsFrom, dtype: torch.dtype) -> None:
    model, base = activated(where, dtype=dtype), tiny_model(dtype=dtype)
    example = paragraphs(where)[0][0]
    ids, start = example["input_ids"], example["adapter_from"]
    trees = [TokenTree(model), TokenTree(base)]
    for tree, acts in zip(trees, (start, None), strict=True):
        tree.extend([[Branch(None, ids, adapter_from=acts)]])
    for ours, theirs in zip(trees[0].cache.layers, trees[1].cache.layers, strict=True):
        for name in ("keys", "values"):
            a, b = (getattr(layer, name) for layer in (ours, theirs))
            assert torch.equal(a[:, :, :start], b[:, :, :start])
            assert not torch.equal(a[:, :, start:], b[:, :, start:])


# Chat ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", WHERE)
def test_chat_is_the_bases(where: ActsFrom, dtype: torch.dtype) -> None:
    model, base = activated(where, dtype=dtype), tiny_model(dtype=dtype)
    encoder = ChatEncoder(tiny_tokenizer())
    ids = torch.tensor(encoder.encode_prompts([CHAT]))
    model(**{k: v for k, v in collator()([paragraphs(where)[0][0]]).items() if k != "labels"})
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base(ids).logits)
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(
            model.generate(input_ids=ids, **options), base.generate(input_ids=ids, **options)
        )


def test_the_demo(tmp_path: Path) -> None:
    encoder, args = ChatEncoder(tiny_tokenizer()), AppArguments(max_new_tokens=6)
    record = {"context": RECORDS[0]["context"], "question": RECORDS[0]["question"]}
    for where in WHERE:
        model = activated(where)
        ours, base = (ChatSession(m, encoder, args) for m in (model, tiny_model()))
        *_, free = ours.converse([], ["Hello, who are you?"])
        *_, expected = base.converse([], ["Hello, who are you?"])
        assert free == expected
        *_, asked = ours.ask(**record)
        local = LocalModel(model, encoder, decoding="free", max_new_tokens=6)
        reply = local.answer([[{**record, "id": "1"}]])[0].reply
        assert asked[-1]["content"] == reply.completion.strip()
        *_, expected = base.ask(**record)
        assert asked != expected


# The stages ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Train an adapter that acts from the context on, once; return the flags and the folder."""
    folder = tmp_path_factory.mktemp("made")
    flags = training_flags(
        folder, "--no_quantize", "--max_steps", "4", "--save_steps", "2", "--eval_steps", "2",
        "--learning_rate", "2e-2", "--lora_r", "4", "--lora_dropout", "0.1",
        "--alora_from", "context", val=RECORDS[:3],
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("llama_squad.training.setup.VALIDATION_TOKENS", 8)
        train_llama_squad.main(flags)
    return flags, folder


@pytest.fixture
def trained(made: tuple[list[str], Path], tmp_path: Path, offline: None) -> tuple[list[str], str]:
    """Work in a copy of it; return the flags and the adapter's folder."""
    flags, folder = made
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return flags, str(tmp_path / "results" / "final_checkpoints")


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
def test_trained_saved_and_loaded(trained: tuple[list[str], str], tmp_path: Path) -> None:
    flags, folder = trained
    assert weights.acts_from(folder) == "context"
    model_args = ModelArguments(model_name=str(tmp_path / "model"))
    model: Any = modeling.load_model(model_args, adapter_name=folder)
    activation = activation_of(model)
    assert activation is not None
    assert activation.where == "context"
    reader, base = Reader(folder), Reader(str(tmp_path / "model"))
    assert reader.chat(CHAT) == base.chat(CHAT)
    again = Reader(folder)
    asked = [(r["question"], r["context"]) for r in RECORDS]
    readings = [reader(*pair) for pair in asked]
    assert readings == [again(*pair) for pair in asked]
    assert readings != [base(*pair) for pair in asked]
    # the checkpoint of step 2, gone on with, gives the same adapter
    whole = Path(folder, "adapter_model.safetensors").read_bytes()
    train_llama_squad.main([*flags, "--resume_from_checkpoint", "results/checkpoint-2"])
    from safetensors.torch import load

    resumed = load(Path(folder, "adapter_model.safetensors").read_bytes())
    for name, weight in load(whole).items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=1e-7)


def test_it_is_not_merged(trained: tuple[list[str], str], tmp_path: Path) -> None:
    flags, folder = trained
    model = modeling.load_model(
        ModelArguments(model_name=str(tmp_path / "model")), adapter_name=folder
    )
    with pytest.raises(ValueError, match="acts from the context on cannot be merged, because"):
        merge(model, torch.float32)
    for more, message in (
        (["--merge_and_push"], "cannot be merged, because"),
        (["--use_dora"], "--use_dora scales"),
        (["--full_parameters"], "--alora_from would do nothing"),
    ):
        with pytest.raises(SystemExit, match=message):
            train_llama_squad.main([*flags, *more])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--merge_and_push"], "acts from the context on: such an adapter cannot be merged"),
        (["--chat_share", "0.1"], "--chat_share would train nothing: leave out --chat_share\n"),
        (["--reasoning_tokens", "2"], "as it is: leave out --reasoning_tokens"),
    ],
)
def test_what_an_adapter_brings_is_checked_before_it_is_trained_on(
    more: list[str],
    message: str,
    trained: tuple[list[str], str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, folder = trained
    flags = ["--from_adapter", folder, "--dataset_name", str(tmp_path / "dataset")]
    with pytest.raises(SystemExit) as error:
        train_llama_squad.main([*flags, "--output_dir", "further", *more])
    assert message in f"{error.value}{capsys.readouterr().err}\n"
    assert not Path("further").exists()


@pytest.mark.usefixtures("brief")
def test_given_texts_are_the_bases(
    trained: tuple[list[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    _, folder = trained
    asked = []

    def harness(arguments: Sequence[str], log: Path) -> None:
        asked.append(arguments)
        out = Path(arguments[arguments.index("--output_path") + 1])
        content = {
            "results": {"t": {"alias": "t", "acc,none": 0.5}},
            "configs": {},
            "n-samples": {},
        }
        (out / "results_1.json").write_text(json.dumps(content))

    monkeypatch.setattr(forgetting, "run_harness", harness)
    monkeypatch.setattr("sys.argv", ["eval.sh"])
    out = tmp_path / "eval"
    forgetting.main([folder, "--output_path", str(out), "--device", "cpu"])
    said = capsys.readouterr()
    assert "the base's run stands for both" in said.err
    assert len(asked) == 1
    assert "peft" not in asked[0][asked[0].index("--model_args") + 1]
    replies = [
        json.loads(path.read_text())["replies"]
        for path in (next(out.glob("chat-base-*.json")), out / "chat-tuned.json")
    ]
    assert [r["text"] for r in replies[0]] == [r["text"] for r in replies[1]]


def test_an_adapter_that_says_nothing_acts_everywhere(trained: tuple[list[str], str]) -> None:
    _, folder = trained
    Path(folder, RUN_CONFIG).unlink()
    assert weights.acts_from(folder) == "start"
