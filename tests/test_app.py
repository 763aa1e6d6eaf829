"""app.py: the verdict, the conversation, the server through its client, and the real page.

Most tests talk to a scripted model, whose replies are known; a tiny random Llama with a tokenizer
trained here stands for the real ones.
"""

import dataclasses
import html
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
import torch
from browser import free_port, open_page, select_words
from gradio_client import Client
from helpers import make_records, model_folder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import app
from llama_squad.answers import Answer, format_answer
from llama_squad.arguments import AppArguments, CreateArguments, ModelArguments
from llama_squad.data import write_dataset
from llama_squad.decoding.chat import ChatSession
from llama_squad.encoding import ChatEncoder
from llama_squad.feedback import verdicts
from llama_squad.page import ask, style, talk
from llama_squad.page import desk as desk_module
from llama_squad.page.access import who_may_come_in
from llama_squad.page.desk import Answering, Desk
from llama_squad.reader import Reading, SpanAnswer

ROOT = Path(__file__).resolve().parents[1]
SPECIAL = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TEMPLATE = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
CONTEXT = "Lily lived by the sea with a cat named Tom. The cat <b>Tom</b> & Lily spell <|eot_id|>."
RECORDS: list[dict[str, Any]] = [
    {
        "id": "q1", "title": "Lily", "context": CONTEXT, "question": "What was the cat's name?",
        "answers": {"text": ["Tom", "a cat named Tom", "Tom"], "answer_start": [39, 27, 39]},
    },
]  # fmt: skip


class ScriptedModel:
    """Says ``reply(prompt)`` whatever the weights: its cache is what it has yet to say."""

    def __init__(self, tokenizer: Any, reply: Any, pause: float = 0.0) -> None:
        self.tokenizer, self.reply, self.pause = tokenizer, reply, pause
        self.config = LlamaConfig(max_position_embeddings=2048)
        self.generation_config = SimpleNamespace(eos_token_id=None)
        self.device = torch.device("cpu")
        self.prompts: list[list[int]] = []

    def __call__(self, input_ids: Any, past_key_values: Any, **_: Any) -> Any:
        time.sleep(self.pause)
        ids = past_key_values
        if ids is None:
            self.prompts.append(input_ids[0].tolist())
            text = self.reply(self.tokenizer.decode(input_ids[0]))
            ids = [*self.tokenizer.encode(text, add_special_tokens=False), 3]
        logits = torch.zeros(1, 1, len(self.tokenizer))
        logits[0, 0, ids[0]] = 1
        return SimpleNamespace(logits=logits, past_key_values=ids[1:])


def answer_tom(_: str) -> str:
    return format_answer("Tom")


def last_user_turn(prompt: str) -> str:
    return prompt.rpartition("user<|end_header_id|>\n\n")[2].partition("<|eot_id|>")[0]


def echo(prompt: str) -> str:
    return "You said: " + last_user_turn(prompt)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with Llama 3's turns, trained in-process."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [CONTEXT] * 3,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=SPECIAL[0], eos_token=SPECIAL[3], pad_token=SPECIAL[3]
    )
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="module")
def llama(tokenizer: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=2048, eos_token_id=3, bos_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("data") / "squad")
    write_dataset({"train": RECORDS, "test": RECORDS}, CreateArguments(dataset_name=folder))
    return folder


class ScriptedReader:
    """Reads "Tom" wherever it stands, and knows of one other word; counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def read(self, records: Any) -> list[Reading]:
        self.asked += len(records)
        return [self._read(record["context"]) for record in records]

    def _read(self, context: str) -> Reading:
        start = context.find("Tom")
        if start < 0:
            return Reading(None, None, None, 1.0, -0.1)
        spans = (SpanAnswer("Tom", start, start + 3, -0.5), SpanAnswer(context[:4], 0, 4, -1.5))
        return Reading("Tom", start, start + 3, 0.25, -0.5, spans)


def scripted(tokenizer: Any, reply: Any, pause: float = 0.0, **settings: Any) -> Desk:
    model = ScriptedModel(tokenizer, reply, pause)
    args = AppArguments(**settings)
    session = ChatSession(model, ChatEncoder(tokenizer), args)
    return Desk(ScriptedReader(), session, args, answering=Answering("a-scripted-model"))


@pytest.fixture
def serve(tokenizer: Any, tmp_path: Path) -> Iterator[Any]:
    """Serve a page whose model is scripted; returns its address."""
    pages = []

    def start(reply: Any, pause: float = 0.0, **settings: Any) -> str:
        settings = {"feedback": str(tmp_path / "feedback.jsonl")} | settings
        page = app.build(scripted(tokenizer, reply, pause, **settings))
        pages.append(page)
        options = {"server_name": "127.0.0.1", "server_port": free_port(), "quiet": True}
        return app.serve(page, prevent_thread_lock=True, **options)[1]

    yield start
    for page in pages:
        page.close(verbose=False)


def connect(url: str) -> Client:
    return Client(url, verbose=False, analytics_enabled=False)


def plain(markup: str) -> str:
    return re.sub(r"\s*<[^>]+>\s*", "|", markup)


def texts(messages: Any) -> list[str]:
    """Return what a chatbot shows, as its reader sees it; the server sends contents in parts."""
    parts = [m["content"] for m in messages]
    return [html.unescape(p if isinstance(p, str) else p[0]["text"]) for p in parts]


def say(client: Client, said: str) -> list[Any]:
    """Say something, and return the conversation, the verdict on the reply, and the next draft."""
    messages, _, judged, draft = client.predict("", "", said, "tuned", api_name="/chat")
    return [messages, judged, draft]


# The verdict ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "context", "golds", "expected"),
    [
        ('```json\n{\n  "answer": "Tom"\n}\n```', "cat Tom", ["Tom"],
         talk.Judgement(Answer("answer", "Tom"), True, True, 1.0)),
        ('{"answer": "the Tom"}', "cat Tom", ["Tom"],
         talk.Judgement(Answer("answer", "the Tom"), False, False, 1.0)),
        ('{"answer": "Tom"}', "cat Tom", [],
         talk.Judgement(Answer("answer", "Tom"), True, False, 0.0)),
        ('{"answer": "Tom"}', "cat Tom", None, talk.Judgement(Answer("answer", "Tom"), True, None, None)),
        ('{"answer": ""}', "cat Tom", ["Tom"],
         talk.Judgement(Answer("answer", ""), False, False, 0.0)),
        ('{"answer": "?"}', "cat Tom", [],
         talk.Judgement(Answer("no_answer", "?"), None, True, 1.0)),
        ('{"answer": "?"}', "cat Tom?", ["Tom"],
         talk.Judgement(Answer("no_answer", "?"), None, False, 0.0)),
        ("Tom", "cat Tom", ["Tom"], talk.Judgement(Answer("malformed", ""), None, False, 0.0)),
        ("?", "cat Tom", [], talk.Judgement(Answer("malformed", ""), None, False, 0.0)),
        ('{"answer": "Tom"}', None, None, talk.Judgement(Answer("answer", "Tom"), None, None, None)),
    ],
)  # fmt: skip
def test_verdict(reply: str, context: str, golds: list[str], expected: talk.Judgement) -> None:
    assert talk.judge(reply, context, golds) == expected


def test_a_verdict_is_shown_in_words_and_escaped() -> None:
    shown = talk.show_judgement(talk.judge('{"answer": "<b>"}', "a <b> c", ["<b>"]))
    assert '<p class="span">&lt;b&gt;</p>' in shown
    assert "right · word for word in the text" in shown
    assert 'class="card good"' in shown
    wrong = talk.show_judgement(talk.judge('{"answer": "cat Tom"}', "x", ["Tom"]))
    assert "wrong (F1 67%) · not in the text" in wrong
    assert 'class="card bad"' in wrong
    assert "malformed" in talk.show_judgement(talk.judge("Hello.", "a context"))
    assert "malformed" not in talk.show_judgement(talk.judge("Hello."), free=True)


def test_right_answers_are_shown_once_each() -> None:
    assert plain(talk.show_golds(["Tom", "a cat", "Tom"])).count("Tom") == 1
    assert "no answer: ?" in talk.show_golds([])


# The conversation ----------------------------------------------------------------------------


def test_turns_without_a_reply_are_left_out_of_the_history() -> None:
    turns = [
        ("user", "stopped"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", ""),
    ]
    history = [{"role": role, "content": content} for role, content in turns]
    assert [m["content"] for m in talk.answered_turns(history)] == ["a", "b"]


@pytest.mark.parametrize("text", [CONTEXT, "a &lt; b &amp;amp; </s> <br>", '{"a": "b"}'])
def test_what_is_said_is_shown_as_it_stands(text: str) -> None:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    shown = talk.as_shown(messages)
    assert texts(shown) == [text, text]
    assert not any("<" in message["content"] for message in shown)


def test_a_prompt_is_folded_to_its_question() -> None:
    prompt = {"role": "user", "content": f"Find it.\nContext: {CONTEXT}\nQuestion: Who & why?"}
    reply = {"role": "assistant", "content": CONTEXT}
    assert texts(talk.as_shown([prompt, reply], CONTEXT)) == ["Who & why?", CONTEXT]
    said = {"role": "user", "content": f"Is {CONTEXT} all there is?"}  # by the visitor
    assert texts(talk.as_shown([said], CONTEXT)) == [said["content"]]


def test_a_reply_is_the_greedy_one(tokenizer: Any, llama: Any) -> None:
    encoder = ChatEncoder(tokenizer)
    talker = ChatSession(llama, encoder, AppArguments(max_new_tokens=24))
    *_, messages = talker.ask(CONTEXT, "Who?")
    prompt = {"role": "system", "content": talker.args.system_prompt}, messages[0]
    ids = torch.tensor(encoder.encode_prompts([prompt]))
    expected = llama.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
    )[0, ids.shape[1] :]
    assert messages[1]["role"] == "assistant"
    assert messages[1]["content"] == tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert len(messages[1]["content"]) > 5


def test_multi_turn_feeds_the_replies_back(tokenizer: Any) -> None:
    desk = scripted(
        tokenizer, lambda prompt: f"Reply {prompt.count('assistant')}", prompt="multi_turn"
    )
    talker = desk.session
    *_, messages = desk.ask(CONTEXT, "What was the cat's name?")
    assert [m["role"] for m in messages] == ["user", "assistant"] * 3
    assert [m["content"] for m in messages[1::2]] == ["Reply 2", "Reply 3", "Reply 4"]
    last = tokenizer.decode(talker.model.prompts[2])
    assert last.count("Reply") == 2
    assert CONTEXT in messages[0]["content"]


def test_control_tokens_in_a_context_stay_text(tokenizer: Any) -> None:
    talker = scripted(tokenizer, answer_tom).session
    list(talker.ask(CONTEXT, "What about <|eot_id|>?"))
    assert talker.model.prompts[0].count(3) == 2  # the ends of the system's and the user's turn


def test_streaming_never_shows_half_a_character(tokenizer: Any) -> None:
    talker = scripted(tokenizer, lambda _: "né 😀!", 0.06).session
    shown = [m[-1]["content"] for m in talker.converse([], ["hello"]) if len(m) == 2]
    assert shown == ["n", "né", "né ", "né 😀", "né 😀!", "né 😀!"]


def test_a_conversation_that_is_too_long_says_so(tokenizer: Any) -> None:
    desk = scripted(tokenizer, answer_tom)
    with pytest.raises(ValueError, match="the model reads at most 2048"):
        list(talk.speak(desk, "word " * 3000, "Who?", None, "tuned"))


# The answer ----------------------------------------------------------------------------------


def test_another_threshold_decides_anew_without_the_model(tokenizer: Any) -> None:
    desk = scripted(tokenizer, answer_tom)
    asked = ask.read(desk, CONTEXT, "Who?", compare=False)
    card, text, bars = ask.show(asked, 0.5, ["Tom"])
    assert "right · 75.0 % likely that the text holds an answer" in card
    assert text["marks"] == [{"start": 39, "end": 42, "kind": "answer"}]
    assert [(b["label"], b["chosen"]) for b in bars["bars"]] == [
        ("Tom", True), ("Lily", False), ("no answer in the text", False),
    ]  # fmt: skip
    tom, lily, none = (bar["probability"] for bar in bars["bars"])
    assert tom + lily + none == pytest.approx(1)
    assert tom / none == pytest.approx(3)  # as na_prob says
    assert tom / lily == pytest.approx(math.e)
    card, text, bars = ask.show(asked, 0.2, ["Tom"])
    assert "The text does not say." in card and "wrong" in card
    assert text["marks"] == []
    assert [b["label"] for b in bars["bars"] if b["chosen"]] == ["no answer in the text"]
    assert desk.reader.asked == 1


@pytest.mark.parametrize("probability", [0.0, 1e-9, 0.0004, 0.5, 0.9996, 1 - 1e-9, 1.0])
def test_no_probability_is_shown_as_more_certain_than_it_is(probability: float) -> None:
    shown = style.percent(probability)
    assert (shown in ("0.0 %", "100.0 %")) == (probability in (0, 1))


@pytest.mark.parametrize(
    ("context", "question", "message"),
    [
        (" ", "Who?", "Fill in a text and a question first."),
        ("Tom", " ", "Fill in a text and a question first."),
        ("Tom " * 200_000, "Who?", "The text has 800,000 characters; at most 400,000"),
        ("Tom", "Who? " * 1000, "The question has 5,000 characters; at most 2,000"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    tokenizer: Any, context: str, question: str, message: str
) -> None:
    desk = scripted(tokenizer, answer_tom)
    with pytest.raises(ValueError, match=message):
        desk.read([{"context": context, "question": question}])
    with pytest.raises(ValueError, match=message):
        desk.ask(context, question)
    assert desk.reader.asked == 0


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
def test_base_and_tuned_share_their_weights(tmp_path: Path, quantize: bool) -> None:
    """With the adapter switched off, the base model answers and speaks as it does alone."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = model_folder(tmp_path, hidden_size=64, intermediate_size=128)
    torch.manual_seed(1)
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    )
    tuned.save_pretrained(str(tmp_path / "adapter"))

    def load(adapter: str | None) -> Desk:
        args = AppArguments(adapter_name=adapter, quantize=quantize, max_new_tokens=8)
        return desk_module.load(args, ModelArguments(model_name=base))

    both, alone = load(str(tmp_path / "adapter")), load(None)
    assert both.has_adapter and not alone.has_adapter
    records = make_records(3, [2], seed=4)
    off, on = both.read(records, base=True), both.read(records)
    for plain, reading, other in zip(alone.read(records), off, on, strict=True):
        assert (reading.answer, reading.start) == (plain.answer, plain.start)
        assert reading.score == pytest.approx(plain.score, abs=1e-3)
        assert other.score != pytest.approx(plain.score, abs=0.1)
    context, question = records[0]["context"], records[0]["question"]
    *_, (talks, cards) = talk.speak(both, context, question, None, "both")
    *_, (plain_talks, _) = talk.speak(alone, context, question, None, "both")
    assert talks[1] == plain_talks[0]
    assert talks[0] != talks[1]
    assert plain_talks[1] == []
    assert "of the base model" in cards
    *_, (talks, _) = talk.chat(both, "Why?", talks, "base")
    assert [len(t) for t in talks] == [2, 4]
    *_, (chatted, _) = talk.chat(both, "Why?", talks, "tuned")  # by the base, unless asked
    *_, (expected, _) = talk.chat(alone, "Why?", [talks[0], []], "tuned")
    assert chatted[0] == expected[0]
    both.session.args = dataclasses.replace(both.args, chat_adapter=True)
    *_, (left_on, _) = talk.chat(both, "Why?", talks, "tuned")
    assert left_on[0] != expected[0]


# The server ----------------------------------------------------------------------------------


def test_a_fault_of_the_model_is_a_message_and_not_a_trace(serve: Any) -> None:
    def fail(_: str) -> str:
        raise RuntimeError("CUDA out of <memory>")

    _, shown, draft = say(connect(serve(fail)), "Hello")
    assert "CUDA out of &lt;memory&gt;" in shown
    assert "Traceback" not in shown
    assert draft == "Hello"


def test_a_chat_turn_streams(serve: Any) -> None:
    client = connect(serve(echo, 0.02))
    job = client.submit("", "", "Hello there", "tuned", api_name="/chat")
    messages, _, _, draft = job.result(60)
    assert texts(messages) == ["Hello there", "You said: Hello there"]
    assert draft == ""
    assert len(job.outputs()) > 3
    messages, _, _ = say(client, "And now?")
    assert texts(messages) == [
        "Hello there", "You said: Hello there", "And now?", "You said: And now?",
    ]  # fmt: skip
    messages, *_ = client.predict("", "", "tuned", api_name="/explain")
    assert texts(messages)[-1] == "You said: Explain your reasoning."


@pytest.mark.parametrize("prompt", ["single_turn", "multi_turn"])
def test_a_random_question_is_answered_and_judged(serve: Any, dataset: str, prompt: str) -> None:
    client = connect(serve(answer_tom, dataset_name=dataset, prompt=prompt))
    context, question, golds = client.predict(api_name="/random_question")
    assert (context, question) == (CONTEXT, "What was the cat's name?")
    assert golds == ""  # until they are asked for
    card, *_ = client.predict(context, question, 0.5, False, api_name="/ask")
    assert "Tom" in card and "right" not in card
    golds, card, text, _ = client.predict(0.5, api_name="/right_answer")
    assert plain(golds).strip("|").split("||") == [
        "Right answer", "Tom", "a cat named Tom", "any of these counts",
    ]  # fmt: skip
    assert "right · 75.0 % likely" in card
    assert text["text"] == CONTEXT
    messages, _, verdict, _ = client.predict(context, question, "tuned", api_name="/speak")
    assert len(messages) == (2 if prompt == "single_turn" else 6)
    assert texts(messages)[0] == question  # the prompt is folded away
    assert "right · word for word in the text" in verdict


def test_the_right_answer_of_another_question_is_not_known(tokenizer: Any) -> None:
    record = RECORDS[0]
    assert talk.known_golds(record, CONTEXT, record["question"]) == record["answers"]["text"]
    assert talk.known_golds(record, CONTEXT, "Who lived by the sea?") is None
    assert talk.known_golds(None, CONTEXT, record["question"]) is None


def test_without_a_dataset_the_button_says_what_to_do(serve: Any, tmp_path: Path) -> None:
    client = connect(serve(answer_tom, dataset_name=str(tmp_path / "none")))
    *_, golds = client.predict(api_name="/random_question")
    assert "python create_squad_dataset.py" in golds


def test_a_question_that_could_not_be_drawn_clears_nothing() -> None:
    """The page goes on to clear what the last question left: not the message, though."""
    tab: Any = object.__new__(ask.AskTab)
    tab.desk = None  # of which nothing can be drawn
    *_, drawn = tab.on_draw()
    left, cleared = tab.on_drawn(None, drawn), tab.on_drawn(None)
    assert left == (gr.skip(),) * len(cleared) != cleared


def test_empty_fields_are_refused(serve: Any) -> None:
    client = connect(serve(answer_tom))
    assert "Fill in a text" in client.predict(" ", "Who?", "tuned", api_name="/speak")[2]
    assert "Write a message" in say(client, " ")[1]


def test_visitors_do_not_mix(serve: Any) -> None:
    url = serve(echo, 0.002)

    def visit(number: int) -> list[str]:
        client = connect(url)
        for turn in range(2):
            messages, *_ = say(client, f"I am visitor {number}, turn {turn}")
        return texts(messages)

    with ThreadPoolExecutor(4) as pool:
        for number, contents in enumerate(pool.map(visit, range(4))):
            said = [f"I am visitor {number}, turn {turn}" for turn in range(2)]
            assert contents == [said[0], f"You said: {said[0]}", said[1], f"You said: {said[1]}"]


@pytest.mark.slow
def test_thirty_visitors_at_once_are_all_answered(serve: Any) -> None:
    client = connect(serve(answer_tom))
    texts_of = [f"Number {n} is called Tom." for n in range(30)]
    jobs = [client.submit(t, "Who?", 0.5, False, api_name="/ask") for t in texts_of]
    shown = [job.result(120)[1] for job in jobs]
    assert [value["value"]["text"] for value in shown] == texts_of


# The command line ----------------------------------------------------------------------------


def test_importing_loads_nothing_heavy() -> None:
    code = "import sys, app; print({'torch', 'transformers', 'gradio', 'peft'} & set(sys.modules))"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "set()"


@pytest.mark.slow
def test_the_command_runs_as_written(tmp_path: Path, tokenizer: Any, llama: Any) -> None:
    from peft import LoraConfig, get_peft_model

    base, adapter = tmp_path / "base", tmp_path / "results" / "final_checkpoints"
    llama.save_pretrained(base)
    tokenizer.save_pretrained(base)
    fresh = LlamaForCausalLM.from_pretrained(base)
    get_peft_model(fresh, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(
        str(adapter)
    )
    saved = {"stage": "train", "prompt": "multi_turn", "system_prompt": ""}
    (adapter / "llama_squad.json").write_text(json.dumps(saved))
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "app.py"), "--adapter_name=results/final_checkpoints",
             f"--port={free_port()}", "--max_new_tokens=5"],
            cwd=tmp_path, stdout=out, stderr=out, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
    try:
        for _ in range(600):
            found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
            if found or process.poll() is not None:
                break
            time.sleep(0.1)
        assert found, log.read_text()
        client = connect(found[0])
        messages, *_ = client.predict(CONTEXT, "Who?", "tuned", api_name="/speak")
        assert [m["role"] for m in messages] == ["user", "assistant"] * 3
        card, text, *_ = client.predict(CONTEXT, "Who?", 1.0, False, api_name="/ask")
        (mark,) = text["value"]["marks"]
        assert f">{html.escape(CONTEXT[mark['start'] : mark['end']])}<" in card
    finally:
        process.terminate()
        process.wait(20)
    assert log.read_text().count("running on the CPU") == (not torch.cuda.is_available())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "70000"], "--port must be at most 65535, not 70000"),
        (["--host", "0.0.0.0"], "--host 0.0.0.0 opens the page to others: say who may come in"),
        (["--share"], "--share opens the page to others"),
        (["--host", "0.0.0.0", "--auth", "ada:"], "--auth takes NAME:PASSWORD"),
        (["--auth", "nobody.txt"], "--auth: no file nobody.txt here"),
        (["--review", "nothing.csv"], "--review: no file nothing.csv here"),
    ],
)
def test_mistakes_are_one_line(flags: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        app.main(["--model_name", "M/M", "--feedback", str(tmp_path / "f.jsonl"), *flags])
    assert message in str(ended.value)


def test_a_file_of_passwords_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "pw").write_bytes(b"ada:\xff")
    with pytest.raises(SystemExit, match=r"--auth: cannot read .*pw: 'utf-8' codec"):
        app.main(["--auth", str(tmp_path / "pw")])


def test_who_may_come_in(tmp_path: Path) -> None:
    (tmp_path / "who").write_text("ada:1815\n\nbo:a:b\n")
    (tmp_path / "who:2").write_text("di:y\n")  # as C:\\who has one
    files = [str(tmp_path / "who"), str(tmp_path / "who:2")]
    args = AppArguments(host="0.0.0.0", auth=["cy:x", *files])
    assert who_may_come_in(args) == [("cy", "x"), ("ada", "1815"), ("bo", "a:b"), ("di", "y")]
    for host in ("127.0.0.1", "localhost", "::1"):
        assert who_may_come_in(AppArguments(host=host)) == []
    with pytest.raises(ValueError, match="opens the page to others"):
        who_may_come_in(AppArguments(host="127.evil.example"))


# The page ------------------------------------------------------------------------------------


@pytest.fixture
def browser_page() -> Iterator[Any]:
    with open_page() as opened:
        yield opened


@pytest.mark.slow
def test_the_page(serve: Any, dataset: str, browser_page: Any) -> None:
    def reply(prompt: str) -> str:
        return answer_tom(prompt) if "JSON" in last_user_turn(prompt) else echo(prompt)

    page, abroad = browser_page
    page.goto(serve(reply, dataset_name=dataset))
    page.get_by_role("button", name="Ask", exact=True).click()  # nothing to ask yet
    page.get_by_text("Fill in a text and a question first").wait_for()
    assert page.get_by_text("stands here, and is marked in the text").is_visible()
    page.get_by_role("button", name="Random question").click()
    page.get_by_role("button", name="Show the right answer").wait_for()
    assert page.get_by_role("textbox", name="Text").input_value() == CONTEXT
    page.get_by_role("textbox", name="Question").press("Enter")
    marked = page.locator("#ask-text mark.answer")
    marked.wait_for()
    assert marked.inner_text() == "Tom"
    assert page.locator("#ask-text .text").inner_text() == CONTEXT  # markup and all
    page.get_by_role("button", name="Lily").hover()
    assert page.locator("#ask-text mark.lit").inner_text() == "Lily"
    page.get_by_role("button", name="Show the right answer").click()
    page.get_by_text("right · 75.0 % likely").wait_for()
    page.get_by_label("number input for No-answer threshold").fill("0.1")
    page.get_by_label("number input for No-answer threshold").press("Enter")
    page.get_by_text("wrong · 75.0 % likely").wait_for()
    assert marked.count() == 0
    page.get_by_role("button", name="Let the model speak freely").click()
    page.get_by_text("right · word for word in the text").wait_for()
    shown = page.locator(".chat").first.inner_text()
    assert "What was the cat's name?" in shown and CONTEXT not in shown  # the prompt is folded
    assert '  "answer": "Tom"' in shown
    page.get_by_placeholder("Write a message").fill("Is </s> a <b>tag</b>?")
    page.get_by_role("button", name="Send").click()
    page.get_by_text("You said: Is </s> a <b>tag</b>?", exact=True).wait_for()
    page.get_by_text("free chat needs no JSON").wait_for()
    page.get_by_role("textbox", name="Question").fill("Who lived by the sea?")
    page.get_by_text("any of these counts").wait_for(state="detached")
    page.get_by_role("button", name="Random question").click()  # clears the last one
    page.get_by_text("stands here, and is marked in the text").wait_for()
    page.get_by_text("You said").first.wait_for(state="detached")
    assert abroad == []


@pytest.mark.slow
def test_the_review(serve: Any, dataset: str, browser_page: Any, tmp_path: Path) -> None:
    """A verdict by each key, on a file of one's own; and undo."""
    page, abroad = browser_page
    questions = ["Who is it?", "Who is the cat?", "Who is Lily?", "How old is Tom?", "Who left?"]
    own, path = tmp_path / "own.jsonl", tmp_path / "feedback.jsonl"
    rows = [{"id": str(n), "context": CONTEXT, "question": q} for n, q in enumerate(questions)]
    own.write_text("\n".join(map(json.dumps, rows)))
    page.goto(serve(answer_tom, dataset_name=dataset, review=str(own), feedback=str(path)))
    page.get_by_role("tab", name="Review").click()
    page.get_by_role("button", name="Start").click()
    shown = page.locator(".card .span")
    for question, key in zip(questions, "r2mns", strict=True):
        shown.get_by_text(question).wait_for()
        if key == "m":
            page.keyboard.press("m")
            page.get_by_text("Mark the right words first").wait_for()
            select_words(page, "#review-text", "named Tom. The")
            page.locator(".marked").get_by_text("named Tom. The", exact=True).wait_for()
            page.locator("#review-text .text").focus()  # and on by the keyboard
            page.keyboard.press("Shift+ArrowRight")
            page.keyboard.press("Shift+ArrowLeft")
            page.keyboard.press("Shift+ArrowLeft")
            page.locator(".card.good").get_by_text("named Tom.", exact=True).wait_for()
        page.keyboard.press(key)
    page.get_by_text("Nothing is left to review here").wait_for()
    page.get_by_text("4 of 5 judged here, 4 in all · the model is right in 1 of 4").wait_for()
    found = verdicts.load(path).verdicts
    assert [(v.question, v.verdict, v.corrected, v.corrected_start) for v in found] == [
        ("Who is it?", "right", "Tom", 39), ("Who is the cat?", "picked", "Lily", 0),
        ("Who is Lily?", "marked", "named Tom.", 33), ("How old is Tom?", "unanswerable", None, None),
        ("Who left?", "skipped", None, None),
    ]  # fmt: skip
    assert {(v.answer, v.na_prob, v.model) for v in found} == {("Tom", 0.25, "a-scripted-model")}
    page.keyboard.press("u")
    shown.get_by_text("Who left?").wait_for()
    page.keyboard.press("u")
    shown.get_by_text("How old is Tom?").wait_for()
    page.get_by_label("Note, kept with the verdict").fill("r is not a key here")
    page.locator("#key-w button, button#key-w").click()
    shown.get_by_text("Who left?").wait_for()
    last = verdicts.load(path).verdicts[-1]
    assert (last.question, last.verdict, last.note) == (
        "How old is Tom?", "wrong", "r is not a key here",
    )  # fmt: skip
    assert abroad == []


@pytest.mark.slow
def test_what_is_marked_is_of_one_question(
    serve: Any, dataset: str, browser_page: Any, tmp_path: Path
) -> None:
    """The next question forgets it, though text and answer are the same; a held key judges once."""
    page, _ = browser_page
    own, path = tmp_path / "own.jsonl", tmp_path / "feedback.jsonl"
    rows = [{"id": str(n), "context": CONTEXT, "question": f"Question {n}?"} for n in range(4)]
    own.write_text("\n".join(map(json.dumps, rows)))
    page.goto(serve(answer_tom, dataset_name=dataset, review=str(own), feedback=str(path)))
    page.get_by_role("tab", name="Review").click()
    page.get_by_role("button", name="Start").click()
    shown = page.locator(".card .span")
    shown.get_by_text("Question 0?").wait_for()
    select_words(page, "#review-text", "named Tom.")
    page.locator(".card.good").get_by_text("named Tom.", exact=True).wait_for()
    page.keyboard.press("m")
    shown.get_by_text("Question 1?").wait_for()
    page.keyboard.press("m")
    page.get_by_text("Mark the right words first").wait_for()
    page.keyboard.down("r")
    page.keyboard.down("r")  # as a key repeats that is held
    shown.get_by_text("Question 2?").wait_for()
    page.keyboard.down("r")
    page.keyboard.up("r")
    page.keyboard.press("s")
    shown.get_by_text("Question 3?").wait_for()
    found = [(v.question, v.verdict) for v in verdicts.load(path).verdicts]
    assert found == [
        ("Question 0?", "marked"), ("Question 1?", "right"), ("Question 2?", "skipped"),
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_fits_its_width(serve: Any, dataset: str, width: int) -> None:
    with open_page(width) as (page, _):
        from playwright.sync_api import expect

        page.goto(serve(answer_tom, dataset_name=dataset))
        page.get_by_role("button", name="A name").click()
        text = page.get_by_role("textbox", name="Text")
        expect(text).to_have_value(ask.EXAMPLES["A name"][0])  # or it comes over what is typed
        text.fill("supercalifragilistic" * 5000 + " Tom")
        page.get_by_role("button", name="Ask", exact=True).click()
        page.locator("#ask-text mark.answer").wait_for()
        assert (
            page.locator("#ask-text .text").inner_text() == "supercalifragilistic" * 5000 + " Tom"
        )
        assert page.evaluate("document.documentElement.scrollWidth") == width
        mark = page.locator("#ask-text mark.answer").bounding_box()
        view = page.locator("#ask-text .text").bounding_box()
        assert view["y"] <= mark["y"] <= view["y"] + view["height"]  # scrolled into sight
        beside = page.locator(".card").first.bounding_box()["x"] > view["x"] + view["width"]
        assert beside == (width == 1280)


@pytest.mark.slow
def test_the_stop_button(serve: Any, browser_page: Any) -> None:
    page, _ = browser_page
    page.goto(serve(lambda _: "on and " * 2000, 0.05))  # longer than a busy machine takes to click
    page.get_by_placeholder("Write a message").fill("Go")
    page.get_by_placeholder("Write a message").press("Enter")
    page.get_by_text("on and on").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("button", name="Send").wait_for()
    page.wait_for_timeout(500)
    before = page.locator(".chat").first.inner_text()
    page.wait_for_timeout(1000)
    assert page.locator(".chat").first.inner_text() == before
    assert page.get_by_role("button", name="Let the model speak freely").is_enabled()


def test_the_heading_says_what_answers_as_seen_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    desk = SimpleNamespace(
        args=SimpleNamespace(quantize=False, prompt="single_turn"),
        answering=SimpleNamespace(adapter=str(tmp_path / "results" / "a&b"), model="org/model"),
        session=SimpleNamespace(model=SimpleNamespace(device=torch.device("cpu"))),
    )
    assert "<p>results/a&amp;b · on org/model · single_turn prompt · cpu</p>" in style.header(desk)
    desk.answering = SimpleNamespace(adapter=None, model="/elsewhere/model")
    assert "<p>/elsewhere/model · single_turn prompt · cpu</p>" in style.header(desk)
