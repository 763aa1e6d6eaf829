"""What is run together: the same passes for a paragraph, whatever stands beside it."""

import dataclasses
import itertools
import json
import math
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from audit import audit
from helpers import make_records, tiny_model, tiny_tokenizer

from llama_squad.arguments import EvalArguments
from llama_squad.decoding.generator import Generator, available_memory, free_memory
from llama_squad.decoding.replies import Paragraph, Reply, Span
from llama_squad.encoding import ChatEncoder
from llama_squad.evaluation import begun_with, evaluate
from llama_squad.head import HEAD_ROWS, exact_head
from llama_squad.predictors.base import Prediction, batch_paragraphs
from llama_squad.predictors.local import LocalModel
from llama_squad.products import sums_in_float32
from llama_squad.results import config_path
from llama_squad.tree import gather_hidden, kept_logits


@pytest.mark.parametrize("size", [1, 4, 32])
def test_the_batch_size_parts_no_paragraph(size: Any) -> None:
    records = make_records(5, [3, 1, 7])
    parts = [
        [record["id"] for record in group]
        for batch in batch_paragraphs(records, size)
        for group in batch
    ]
    assert [len(part) for part in parts] == [3, 1, 7, 3, 1]
    assert [*itertools.chain(*parts)] == [record["id"] for record in records]
    assert max(sum(map(len, batch)) for batch in batch_paragraphs(records, size)) <= max(size, 7)


def test_a_very_long_paragraph_is_parted_in_one_way() -> None:
    records = make_records(1, [150])
    for size in (1, 64, 500):
        batches = list(batch_paragraphs(records, size))
        assert [len(group) for batch in batches for group in batch] == [64, 64, 22]


def test_prompts_are_run_in_the_same_shapes_alone_and_beside_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    records = make_records(3, [3, 5, 2])
    model = tiny_model(dtype=torch.bfloat16)
    local = LocalModel(model, ChatEncoder(tiny_tokenizer()))
    shapes = []
    forward = type(model).forward

    def watched(self: Any, **kwargs: Any) -> Any:
        if kwargs["past_key_values"].get_seq_length() == len(local._prefix):
            shapes.append((kwargs["input_ids"].shape, kwargs["attention_mask"].shape))
        return forward(self, **kwargs)

    local.answer(next(batch_paragraphs(records[:1], 1)))  # which checks the tree, once
    monkeypatch.setattr(type(model), "forward", watched)
    alone = [p for batch in batch_paragraphs(records, 1) for p in local.answer(batch)]
    one_by_one = list(shapes)
    shapes.clear()
    (batch,) = batch_paragraphs(records, 32)
    together = local.answer(batch)
    assert len(one_by_one) == 3
    assert shapes == one_by_one
    for a, b in zip(alone, together, strict=True):
        assert a.reply.no_answer_score == b.reply.no_answer_score


def test_logits_of_16_bit_weights_are_float32() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        hidden = model.model(ids).last_hidden_state
        with exact_head(model):
            logits = model(ids).logits
        assert model(ids).logits.dtype == torch.bfloat16  # and the head is as it was
    expected = F.linear(hidden.float(), model.lm_head.weight.float())
    assert torch.equal(logits, expected)
    assert not torch.equal(logits, logits.bfloat16().float())


def test_free_memory_is_that_of_the_model_s_own_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    free = {0: (100, 1000), 1: (40, 1000)}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: asked.append(gpu) or free[gpu])  # type: ignore[func-returns-value]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda gpu: 20 * gpu)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda gpu: 10 * gpu)

    def on(*gpus: int) -> Any:
        weights = [SimpleNamespace(device=gpu, is_cuda=True) for gpu in gpus]
        return SimpleNamespace(parameters=lambda: weights)

    assert free_memory(on(1, 1)) == 0.9 * 50
    assert asked == [1]  # and not the first, which is another process's
    assert free_memory(on(0, 1)) == 0.9 * 50
    assert free_memory(on(0)) == 0.9 * 100


def test_free_memory_of_a_machine_is_shared_by_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert available_memory() > 0
    for name, text in (
        ("max", "3000"),
        ("current", "2500"),
        ("stat", "anon 1\ninactive_file 60\nactive_file 40"),
    ):
        (tmp_path / f"memory.{name}").write_text(f"{text}\n")
    monkeypatch.setattr("llama_squad.decoding.generator.CGROUP", tmp_path)
    assert available_memory() == 600  # of the container
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_memory(cast(Any, None)) == 0.9 * 300
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory() > 600


@torch.no_grad()
def test_a_model_that_is_spread_over_devices() -> None:
    """Accelerate's hooks stand before the head, and gather the hidden states (on one device here)."""
    model = tiny_model(dtype=torch.bfloat16)
    ids = torch.arange(5, 25)[None]
    keep = torch.tensor([[False, True] * 10])
    with exact_head(model):
        expected = kept_logits(model, {"input_ids": ids}, keep)
    add_hook_to_module(model.lm_head, AlignDevicesHook("cpu", io_same_device=True))
    gather_hidden(model)
    with exact_head(model), exact_head(model):
        found = kept_logits(model, {"input_ids": ids}, keep)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert model(ids).logits.dtype == torch.bfloat16  # and the head is as it was
    hook: Any = model.base_model._hf_hook
    assert hook.io_same_device
    assert hook.execution_device == torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [600, HEAD_ROWS + 1])
@torch.no_grad()
def test_logits_under_autocast_are_float32(dtype: torch.dtype, rows: int) -> None:
    """A trainer's evaluation runs under it."""
    model = tiny_model(dtype=dtype, vocab_size=rows)
    ids = torch.arange(5, 25)[None]
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(ids).last_hidden_state
        with exact_head(model):
            logits = model(ids).logits
        assert model(ids).logits.dtype == torch.bfloat16  # and the head is as it was
    expected = F.linear(hidden.float(), model.lm_head.weight.float())
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_what_is_kept_is_made_before_memory_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch is parted by what is free beside it."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(dtype=torch.bfloat16, vocab_size=HEAD_ROWS + len(tokenizer))
    generator = Generator(model, ChatEncoder(tokenizer))
    made = []

    def free(_: Any) -> float:
        made.append(generator.options.kept._head._wide is not None)
        return math.inf

    monkeypatch.setattr("llama_squad.decoding.generator.free_memory", free)
    generator.reply([Paragraph("a", [[5, 6, 7], [5, 6, 8]])])
    assert made == [False, True, True]


def test_logits_of_a_large_head_are_float32() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    head = torch.nn.Linear(64, HEAD_ROWS + 1, bias=False, dtype=torch.bfloat16)
    model.set_output_embeddings(head)
    hidden = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = F.linear(hidden.double(), head.weight.double())
        with exact_head(model), exact_head(model):
            logits = head(hidden)
        assert head(hidden).dtype == torch.bfloat16
    torch.testing.assert_close(logits, expected.float(), rtol=1e-6, atol=1e-6)
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    assert matmul.fp32_precision == "none"


def test_two_threads_leave_torchs_precision_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ends while the second works, if they can be at it both."""
    x = torch.ones(1, 2)
    begun, both = threading.Event(), threading.Event()

    def linear(*_: Any) -> torch.Tensor:
        if not begun.is_set():
            begun.set()
            both.wait(0.5)
        else:
            both.set()
            one.join()
        return x

    monkeypatch.setattr(F, "linear", linear)

    def product() -> None:
        with sums_in_float32(torch.bfloat16):
            F.linear(x, x)

    one, two = (threading.Thread(target=product) for _ in range(2))
    one.start()
    begun.wait()
    two.start()
    two.join()
    assert cast(Any, torch.backends.mkldnn).matmul.fp32_precision == "none"


def _fused_step(model: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    ids = torch.arange(5, 25)[None]
    model(ids, labels=ids).loss.backward()
    optimizer.step()


def _merge_into_head(model: Any) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    get_peft_model(model, config).merge_and_unload()


def _new_data(model: Any) -> None:
    model.lm_head.weight.data = torch.flip(model.lm_head.weight, [0])


@pytest.mark.parametrize("change", [_fused_step, _merge_into_head, _new_data])
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_has_changed_is_read_anew(change: Any, tied: bool) -> None:
    encoder = ChatEncoder(tiny_tokenizer())
    model = tiny_model(dtype=torch.bfloat16, tie_word_embeddings=tied)
    (batch,) = batch_paragraphs(make_records(1, [1]), 1)
    before = LocalModel(model, encoder).answer(batch)[0].reply
    change(model)
    after = LocalModel(model, encoder).answer(batch)[0].reply
    fresh = tiny_model(dtype=torch.bfloat16, tie_word_embeddings=tied)
    fresh.load_state_dict(model.state_dict())
    assert after == LocalModel(fresh, encoder).answer(batch)[0].reply
    assert after.score != before.score


def test_default_batch_grows_with_a_gpus_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = ChatEncoder(tiny_tokenizer())
    generator = Generator(tiny_model(), encoder)
    assert generator.batch_size() == 32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    needed = generator.memory_needed([Paragraph("", [[0] * 400 + [i + 1] * 40 for i in range(10)])])
    sizes = []
    for times in (1, 13, 26, 60, 1000):
        monkeypatch.setattr(
            "llama_squad.decoding.generator.free_memory", lambda _, times=times: times * needed
        )
        sizes.append(generator.batch_size())
    assert sizes == [32, 64, 128, 256, 512]


def audit_of(pairs: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Audit made-up replies: (ours, the best one's), each of text and log-probability."""
    records = [{"id": str(i), "context": f"c{i}", "question": "?"} for i in range(len(pairs))]

    class Fixed:
        def __init__(self, side: Any) -> None:
            self.side = side

        def answer(self, batch: Any) -> Any:
            found = []
            for group in batch:
                for record in group:
                    text, score = pairs[int(record["id"])][self.side]
                    ids = [ord(char) for char in text]
                    reply = Reply(text, ids, score, Span(text, score), proven_best=True)
                    found.append(Prediction(record, "", reply))
            return found

    return audit(Fixed(0), Fixed(1), records, 4)


def test_audit_compares_against_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    same = [(("a", -1.0), ("a", -1.02)), (("b", -2.0), ("b", -2.0))]
    near, far = (("c", -1.0), ("d", -0.99)), (("e", -1.0), ("f", -0.9))
    found = audit_of([*same, near, far], monkeypatch)
    assert (found.questions, found.best) == (4, 3)
    assert found.noise == pytest.approx(0.02)
    assert "0.02" in str(found)
    exact = audit_of([(("a", -1.0), ("a", -1.0)), near], monkeypatch)
    assert (exact.best, exact.noise) == (1, 1e-4)
    assert "differ" not in str(exact)


class OneBatch:
    """Answers one batch, and is interrupted at the next."""

    def __init__(self) -> None:
        self.answered = False

    def answer(self, batch: Any) -> list[Prediction]:
        if self.answered:
            raise KeyboardInterrupt
        self.answered = True
        return [Prediction(r, "", Reply("", [], -1.0)) for group in batch for r in group]


@pytest.mark.parametrize(
    ("settings", "mixed"),
    [
        ({"dtype": "float32"}, False),
        ({"dtype": "bfloat16"}, True),
        ({"dtype": "bfloat16", "predictor": "server"}, False),
    ],
)
def test_a_file_of_several_batch_sizes_says_so_in_16_bits(
    settings: dict[str, str], mixed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, records = tmp_path / "results.csv", make_records(9, [2])
    for size, other in ((2, False), (2, False), (4, True), (2, True)):  # the last: mixed already
        with pytest.raises(KeyboardInterrupt):
            evaluate(OneBatch(), records, output, {**settings, "batch_size": size}, batch_size=size)
        said = "begun with batches of 2" in capsys.readouterr().err
        assert said is (other and mixed)
    saved = json.loads(config_path(output).read_text())
    assert saved["batch_size"] == 2
    assert saved.get("batch_sizes") == ([2, 4] if mixed else None)


def test_a_run_that_goes_on_keeps_its_batch_size(tmp_path: Path) -> None:
    """A GPU with less free memory than before would have another default."""
    args = dataclasses.replace(EvalArguments(), output=str(tmp_path / "results.csv"))
    tuning = dataclasses.replace(args, tune_threshold=True)
    assert begun_with(args) is None
    config_path(tmp_path / "results.csv.val.csv").write_text('{"batch_size": 64}')
    assert (begun_with(args), begun_with(tuning)) == (None, 64)
    config_path(args.output).write_text('{"batch_size": 8}')
    assert begun_with(args) == begun_with(tuning) == 8
    assert begun_with(dataclasses.replace(args, overwrite=True)) is None
