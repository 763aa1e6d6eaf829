"""app.py: the verdict, the conversation, the server through its client, and the real page.

Most tests talk to a scripted model, whose replies are known; a tiny random Llama with a tokenizer
trained here stands for the real ones.
"""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gradio_client import Client
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import app
from llama_squad.answers import Answer, format_answer
from llama_squad.arguments import AppArguments, CreateArguments
from llama_squad.data import write_dataset
from llama_squad.decoding.chat import ChatSession
from llama_squad.encoding import ChatEncoder

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NO_BROWSER = (
    "chromium is not installed (apt-get install chromium)" if not CHROMIUM
    else "playwright is not installed" if not importlib.util.find_spec("playwright") else ""
)  # fmt: skip
CHROMIUM_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip

SPECIAL = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TEMPLATE = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
CONTEXT = "Lily lived by the sea with a cat named Tom. The cat <b>Tom</b> & Lily spell <|eot_id|>."
RECORDS = [
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


def scripted(tokenizer: Any, reply: Any, pause: float = 0.0, **settings: Any) -> ChatSession:
    model = ScriptedModel(tokenizer, reply, pause)
    return ChatSession(model, ChatEncoder(tokenizer), AppArguments(**settings))


@pytest.fixture
def serve(tokenizer: Any) -> Iterator[Any]:
    """Serve a page whose model is scripted; returns its address."""
    pages = []

    def start(reply: Any, pause: float = 0.0, **settings: Any) -> str:
        talker = scripted(tokenizer, reply, pause, **settings)
        page = app.build(talker.args, talker, "a-scripted-model")
        pages.append(page)
        options = {"server_name": "127.0.0.1", "server_port": free_port(), "quiet": True}
        return app.serve(page, prevent_thread_lock=True, **options)[1]

    yield start
    for page in pages:
        page.close(verbose=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def connect(url: str) -> Client:
    return Client(url, verbose=False, analytics_enabled=False)


def plain(markup: str) -> str:
    return re.sub(r"\s*<[^>]+>\s*", "|", markup)


def texts(messages: Any) -> list[str]:
    return [message["content"] for message in app.answered_turns(messages)]


# The verdict ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "context", "golds", "expected"),
    [
        ('```json\n{\n  "answer": "Tom"\n}\n```', "cat Tom", ["Tom"],
         app.Verdict(Answer("answer", "Tom"), True, True, 1.0)),
        ('{"answer": "the Tom"}', "cat Tom", ["Tom"],
         app.Verdict(Answer("answer", "the Tom"), False, False, 1.0)),
        ('{"answer": "Tom"}', "cat Tom", [],
         app.Verdict(Answer("answer", "Tom"), True, False, 0.0)),
        ('{"answer": "Tom"}', "cat Tom", None, app.Verdict(Answer("answer", "Tom"), True, None, None)),
        ('{"answer": ""}', "cat Tom", ["Tom"],
         app.Verdict(Answer("answer", ""), False, False, 0.0)),
        ('{"answer": "?"}', "cat Tom", [],
         app.Verdict(Answer("no_answer", "?"), None, True, 1.0)),
        ('{"answer": "?"}', "cat Tom?", ["Tom"],
         app.Verdict(Answer("no_answer", "?"), None, False, 0.0)),
        ("Tom", "cat Tom", ["Tom"], app.Verdict(Answer("malformed", ""), None, False, 0.0)),
        ("?", "cat Tom", [], app.Verdict(Answer("malformed", ""), None, False, 0.0)),
        ('{"answer": "Tom"}', None, None, app.Verdict(Answer("answer", "Tom"), None, None, None)),
    ],
)  # fmt: skip
def test_verdict(reply: str, context: str, golds: list[str], expected: app.Verdict) -> None:
    assert app.judge(reply, context, golds) == expected


def test_a_verdict_is_shown_in_words_and_escaped() -> None:
    shown = app.show_verdict(app.judge('{"answer": "<b>"}', "a <b> c", ["<b>"]))
    assert '<p class="span">&lt;b&gt;</p>' in shown
    assert "right · word for word in the context" in shown
    assert 'class="card good"' in shown
    wrong = app.show_verdict(app.judge('{"answer": "cat Tom"}', "x", ["Tom"]))
    assert "wrong (F1 67%) · not in the context" in wrong
    assert 'class="card bad"' in wrong
    assert "malformed" in app.show_verdict(app.judge("Hello.", "a context"))
    assert "malformed" not in app.show_verdict(app.judge("Hello."), free=True)


def test_right_answers_are_shown_once_each() -> None:
    assert plain(app.show_golds(["Tom", "a cat", "Tom"])).count("Tom") == 1
    assert "no answer: ?" in app.show_golds([])


# The conversation ----------------------------------------------------------------------------


def test_history_of_client_and_browser_are_read_alike() -> None:
    user, assistant = "1 &lt; 2", "yes"
    from_client = [
        {"role": "user", "content": user, "metadata": None},
        {"role": "assistant", "content": assistant, "metadata": None},
    ]
    from_browser = [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        for message in from_client
    ]
    expected = [{"role": "user", "content": "1 < 2"}, {"role": "assistant", "content": "yes"}]
    assert app.answered_turns(from_client) == expected
    assert app.answered_turns(from_browser) == expected


def test_turns_without_a_reply_are_left_out_of_the_history() -> None:
    turns = [
        ("user", "stopped"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", ""),
    ]
    history = [{"role": role, "content": content} for role, content in turns]
    assert [m["content"] for m in app.answered_turns(history)] == ["a", "b"]


@pytest.mark.parametrize("text", [CONTEXT, "a &lt; b &amp;amp; </s> <br>", '{"a": "b"}'])
def test_what_is_shown_can_be_taken_back(text: str) -> None:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    assert app.answered_turns(app.as_shown(messages)) == messages


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
    talker = scripted(
        tokenizer, lambda prompt: f"Reply {prompt.count('assistant')}", prompt="multi_turn"
    )
    *_, messages = talker.ask(CONTEXT, "What was the cat's name?")
    assert [m["role"] for m in messages] == ["user", "assistant"] * 3
    assert [m["content"] for m in messages[1::2]] == ["Reply 2", "Reply 3", "Reply 4"]
    last = tokenizer.decode(talker.model.prompts[2])
    assert last.count("Reply") == 2
    assert CONTEXT in messages[0]["content"]


def test_control_tokens_in_a_context_stay_text(tokenizer: Any) -> None:
    talker = scripted(tokenizer, answer_tom)
    list(talker.ask(CONTEXT, "What about <|eot_id|>?"))
    assert talker.model.prompts[0].count(3) == 2  # the ends of the system's and the user's turn


def test_streaming_never_shows_half_a_character(tokenizer: Any) -> None:
    talker = scripted(tokenizer, lambda _: "né 😀!", 0.06)
    shown = [m[-1]["content"] for m in talker.converse([], ["hello"]) if len(m) == 2]
    assert shown == ["n", "né", "né ", "né 😀", "né 😀!", "né 😀!"]


def test_a_conversation_that_is_too_long_says_so(tokenizer: Any) -> None:
    talker = scripted(tokenizer, answer_tom)
    *_, (messages, shown) = app.ask(talker, "word " * 3000, "Who?", None)
    assert "the model reads at most 2048" in shown
    assert len(messages) == 1


def test_a_fault_of_the_model_is_a_message_and_not_a_trace(tokenizer: Any) -> None:
    def fail(_: str) -> str:
        raise RuntimeError("CUDA out of <memory>")

    *_, (_, shown, draft) = app.chat(scripted(tokenizer, fail), "Hello", [])
    assert "CUDA out of &lt;memory&gt;" in shown
    assert "Traceback" not in shown
    assert draft == "Hello"


# The server ----------------------------------------------------------------------------------


def test_a_chat_turn_streams(serve: Any) -> None:
    client = connect(serve(echo, 0.02))
    job = client.submit("Hello there", [], api_name="/chat")
    messages, _, draft = job.result(60)
    assert texts(messages) == ["Hello there", "You said: Hello there"]
    assert draft == ""
    assert len(job.outputs()) > 3
    messages, _, _ = client.predict("And now?", messages, api_name="/chat")
    assert texts(messages) == [
        "Hello there", "You said: Hello there", "And now?", "You said: And now?",
    ]  # fmt: skip


@pytest.mark.parametrize("prompt", ["single_turn", "multi_turn"])
def test_a_random_question_is_answered_and_judged(serve: Any, dataset: str, prompt: str) -> None:
    client = connect(serve(answer_tom, dataset_name=dataset, prompt=prompt))
    context, question, golds, _ = client.predict(api_name="/random_question")
    assert (context, question) == (CONTEXT, "What was the cat's name?")
    assert plain(golds).strip("|").split("||") == [
        "Right answer", "Tom", "a cat named Tom", "any of these counts",
    ]  # fmt: skip
    messages, verdict = client.predict(context, question, api_name="/ask")
    assert len(messages) == (2 if prompt == "single_turn" else 6)
    assert "right · word for word in the context" in verdict
    # a question of the visitor's own has no right answers that are known
    _, verdict = client.predict(context, "Who lived by the sea?", api_name="/ask")
    assert "right" not in plain(verdict)
    assert "word for word in the context" in verdict


def test_without_a_dataset_the_button_says_what_to_do(serve: Any, tmp_path: Path) -> None:
    client = connect(serve(answer_tom, dataset_name=str(tmp_path / "none")))
    *_, golds, _ = client.predict(api_name="/random_question")
    assert "python create_squad_dataset.py" in golds


def test_empty_fields_are_refused(serve: Any) -> None:
    client = connect(serve(answer_tom))
    assert "Fill in a context" in client.predict(" ", "Who?", api_name="/ask")[1]
    assert "Write a message" in client.predict(" ", [], api_name="/chat")[1]


def test_visitors_do_not_mix(serve: Any) -> None:
    url = serve(echo, 0.002)

    def visit(number: int) -> list[str]:
        client = connect(url)
        messages: list[Any] = []
        for turn in range(2):
            said = f"I am visitor {number}, turn {turn}"
            messages, _, _ = client.predict(said, messages, api_name="/chat")
        return texts(messages)

    with ThreadPoolExecutor(4) as pool:
        for number, contents in enumerate(pool.map(visit, range(4))):
            said = [f"I am visitor {number}, turn {turn}" for turn in range(2)]
            assert contents == [said[0], f"You said: {said[0]}", said[1], f"You said: {said[1]}"]


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
        messages, _ = connect(found[0]).predict(CONTEXT, "Who?", api_name="/ask")
        assert [m["role"] for m in messages] == ["user", "assistant"] * 3
    finally:
        process.terminate()
        process.wait(20)
    assert log.read_text().count("running on the CPU") == (not torch.cuda.is_available())


# The page ------------------------------------------------------------------------------------


@pytest.fixture
def browser_page() -> Iterator[Any]:
    """A real page, and the list of what it asked of other machines, which it does not get."""
    if NO_BROWSER:
        pytest.skip(NO_BROWSER)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 860})
        page.set_default_timeout(30_000)
        abroad: list[str] = []

        def keep_home(route: Any) -> None:
            if route.request.url.startswith("http://127.0.0.1:"):
                route.continue_()
            else:
                abroad.append(route.request.url)
                route.abort()

        page.route("**/*", keep_home)
        yield page, abroad
        browser.close()


@pytest.mark.slow
def test_the_page(serve: Any, dataset: str, browser_page: Any) -> None:
    def reply(prompt: str) -> str:
        return answer_tom(prompt) if "JSON" in last_user_turn(prompt) else echo(prompt)

    page, abroad = browser_page
    page.goto(serve(reply, dataset_name=dataset))
    page.get_by_role("button", name="Random question").click()
    page.get_by_text("any of these counts").wait_for()
    assert page.get_by_role("textbox", name="Context").input_value() == CONTEXT
    page.get_by_role("button", name="Ask").click()
    page.get_by_text("right · word for word in the context").wait_for()
    shown = page.locator("#chat").inner_text()
    assert CONTEXT in shown  # with what looks like markup, as it stands
    assert '  "answer": "Tom"' in shown
    page.get_by_placeholder("Write a message").fill("Is </s> a <b>tag</b>?")
    page.get_by_role("button", name="Send").click()
    page.get_by_text("You said: Is </s> a <b>tag</b>?", exact=True).wait_for()
    page.get_by_text("free chat needs no JSON").wait_for()
    page.get_by_role("textbox", name="Question").fill("Who lived by the sea?")
    page.get_by_text("known for random questions").wait_for()
    assert abroad == []


@pytest.mark.slow
def test_the_stop_button(serve: Any, browser_page: Any) -> None:
    page, _ = browser_page
    page.goto(serve(lambda _: "on and " * 400, 0.05))
    page.get_by_placeholder("Write a message").fill("Go")
    page.get_by_placeholder("Write a message").press("Enter")
    page.get_by_text("on and on").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("button", name="Send").wait_for()
    page.wait_for_timeout(500)
    before = page.locator("#chat").inner_text()
    page.wait_for_timeout(1000)
    assert page.locator("#chat").inner_text() == before
    assert page.get_by_role("button", name="Ask").is_enabled()
