"""Task gained against chat kept: what is measured of some adapters, kept, compared and drawn."""

import importlib
import json
import math
import statistics
from pathlib import Path
from typing import Any

import forgetting
import peft
import pytest
import torch
from forgetting_figures import compare_chat, compare_rows
from helpers import dataset_folder, make_records, model_folder, tiny_model, tiny_tokenizer

from llama_squad import chat_check
from llama_squad.answers import Answer
from llama_squad.chat_check import ChatReply
from llama_squad.config import write_json
from llama_squad.encoding import ChatEncoder
from llama_squad.plots import plot_forgetting
from llama_squad.result_reader import read_results
from llama_squad.rows import Row, make_row

PROSE = ChatReply("p", "It is so and not otherwise.", "prose", 6, 0.0, 2.0)
LOST = ChatReply("p", "", "empty", 0, 0.0, None)


def adapter_folder(base: str, folder: Path, alora_from: str = "start") -> str:
    """Save an adapter that changes what its base says."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(tiny_model(), config)
    tuned.peft_config["default"].base_model_name_or_path = base
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=1.0)
    tuned.save_pretrained(str(folder))
    settings = {"alora_from": alora_from, "reasoning_tokens": 0, "chat_share": 0.1}
    write_json(folder / "llama_squad.json", {"train": settings, "trainer": {"learning_rate": 1.0}})
    return str(folder)


def data_folder(folder: Path) -> str:
    """Write the files of benchmarks that the study reads."""
    folder.mkdir()
    turns = [json.dumps({"turns": [f"Who met {name}?", "And?"]}) for name in ("Kalomir", "whom")]
    (folder / "mt_bench_questions.jsonl").write_text("\n".join(turns))
    (folder / "ifeval_prompts.jsonl").write_text('{"prompt": "Write a word."}\n{"prompt": "x"}')
    pages = [json.dumps({"page": "The mill opened in 1912 . " * 200}) for _ in range(2)]
    (folder / "wikitext2_test.jsonl").write_text("\n".join(pages))
    (folder / "tasks").mkdir()
    return str(folder)


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what runs the study, with the stages in this process, and reads its figures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chat_check, "PROSE_WORDS", 2)  # which a tiny model may reach
    base = model_folder(tmp_path)
    flags = [
        "--base", base, "--data", data_folder(tmp_path / "data"), "--output", "out.json",
        "--dataset_name", dataset_folder(tmp_path, make_records(2, [2])), "--questions", "3",
        "--prompts", "2", "1", "--reply_tokens", "6", "--batch_size", "2", "--limit", "4",
        "--wikitext_tokens", "1024",
    ]  # fmt: skip

    calls: list[list[str]] = []
    run = forgetting.subprocess.run

    def stage(command: list[str], **options: Any) -> Any:
        if command[0] == "git":
            return run(command, **options)
        calls.append(command)
        if command[0].endswith("eval.sh"):
            assert options["env"]["PYTHON"] == "a python"
            write_json(Path("results/forgetting/lm_eval/comparison.json"), {"t": {"acc": {}}})
        else:
            importlib.import_module("test_llama_squad").main([*command[2:], "--split", "train"])
        return None

    def measured(*more: str) -> dict[str, Any]:
        forgetting.main([*flags, *more, "--", "--max_new_tokens", "8"])
        return json.loads(Path("out.json").read_text())

    study: Any = measured
    study.calls = calls
    monkeypatch.setattr(forgetting.subprocess, "run", stage)
    return study


def test_figures_of_two_bases_do_not_meet(study: Any, tmp_path: Path) -> None:
    study()
    other = model_folder(tmp_path / "other", initializer_range=0.3)
    with pytest.raises(SystemExit, match=r"out.json holds figures with .* name another file"):
        study("--base", other, "--work", "elsewhere")
    Path("out.json").write_text("[]")
    with pytest.raises(SystemExit, match=r"out.json holds no such figures"):
        study()


def kept_replies(name: str) -> list[dict[str, Any]]:
    """What a study has kept of a model's chat."""
    kept = Path("results/forgetting", name, "chat.json")
    return json.loads(kept.read_text())["replies"]


def check_chat_at_rest(at_rest: dict[str, Any]) -> None:
    """An activated adapter takes no part in chat and given texts; a plain one does."""
    assert at_rest["chat"]["paired"]["words"] == {"difference": 0.0, "standard_error": 0.0}
    assert at_rest["wikitext"]["paired"] == {"difference": 0.0, "standard_error": 0.0}
    replies = [
        [reply["text"] for reply in kept_replies(name)]
        for name in ("base", "acts from the question", "plain")
    ]
    assert replies[0] == replies[1] != replies[2]
    prompts = [reply["prompt"] for reply in kept_replies("base")]
    assert prompts == ["Who met whom?", "Write a word.", "Who met Kalomir?"]


def test_the_study(study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All parts are measured once, adapters come in later, and the picture is drawn."""
    base = str(tmp_path / "model")
    plain = adapter_folder(base, tmp_path / "a" / "plain")
    found = study("--adapter", f"plain={plain}", "--eval_python", "a python")
    assert [Path(c[0 if c[0].endswith("eval.sh") else 1]).name for c in study.calls] == [
        "test_llama_squad.py", "test_llama_squad.py", "eval.sh",
    ]  # fmt: skip
    models = found["models"]
    assert models["base"].keys() == {"task", "chat", "wikitext"}
    assert "paired" not in models["base"]["chat"]
    tuned = models["plain"]
    assert tuned["adapter"] == plain
    assert tuned["trained_with"] == {
        "learning_rate": 1.0, "alora_from": "start", "chat_share": 0.1,
    }  # fmt: skip
    assert tuned["task"]["questions"] == 4  # whole paragraphs
    assert tuned["chat"]["prompts"] == 3
    assert tuned["benchmarks"] == {"t": {"acc": {}}}
    assert tuned["wikitext"]["paired"]["standard_error"] > 0
    assert tuned["wikitext"]["perplexity"] == pytest.approx(
        models["base"]["wikitext"]["perplexity"] + tuned["wikitext"]["paired"]["difference"]
    )
    assert "--adapter plain=" in found["command"]

    # again, with another: what is there is not measured again
    acting = adapter_folder(base, tmp_path / "a" / "question", "question")
    loads: list[str] = []
    load = forgetting.Study.load

    def watched(self: Any, name: str, loaded: Any) -> Any:
        loads.append(name)
        return load(self, name, loaded)

    monkeypatch.setattr(forgetting.Study, "load", watched)
    both = ["--adapter", f"plain={plain}", "--adapter", f"acts from the question={acting}"]
    both += ["--eval_python", "a python"]
    models = study(*both, "--plot", "pictures/p.svg")["models"]
    assert set(loads) == {"acts from the question"} and len(study.calls) == 5
    assert models["plain"] == tuned
    assert "acts from the question" in Path("pictures/p.svg").read_text()
    check_chat_at_rest(models["acts from the question"])


def test_a_whole_model_is_judged_by_its_base(study: Any, tmp_path: Path) -> None:
    """All parameters were trained: it has no adapter to be switched off."""
    folder = tmp_path / "whole"
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.normal_(std=1.0)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    settings = {"full_parameters": True, "alora_from": "question", "reasoning_tokens": 0}
    write_json(folder / "llama_squad.json", {"train": settings, "trainer": {}})
    found = study("--adapter", f"whole={folder}")["models"]["whole"]
    assert found["trained_with"] == {"full_parameters": True}
    kept = json.loads(Path("results/forgetting/whole/chat.json").read_text())["replies"]
    encoder, prompts = ChatEncoder(tiny_tokenizer()), [kept[0]["prompt"]]
    said = chat_check.speak(model.eval(), encoder, prompts, max_new_tokens=6)
    by_base, by_itself = (
        chat_check.judge(each, encoder, prompts, said)[0] for each in (tiny_model().eval(), model)
    )
    assert kept[0]["text"] == by_base.text
    assert kept[0]["perplexity"] == pytest.approx(by_base.perplexity, rel=1e-3)
    assert by_itself.perplexity != pytest.approx(by_base.perplexity, rel=0.1)


def test_a_study_goes_on_where_it_stopped(
    study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    made = forgetting.speak

    def stopped(model: Any, encoder: Any, prompts: Any, **options: Any) -> Any:
        asked.append(len(prompts))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return made(model, encoder, prompts, **options)

    monkeypatch.setattr(forgetting, "speak", stopped)
    with pytest.raises(KeyboardInterrupt):
        study()
    assert len(study()["models"]["base"]["chat"]["prose_interval"]) == 2
    assert asked == [2, 1, 1]
    with pytest.raises(SystemExit, match=r"was made from .*delete it, or name another folder"):
        study("--reply_tokens", "7", "--output", "other.json")
    with pytest.raises(SystemExit, match="out.json holds figures with .*--output"):
        study("--reply_tokens", "7")


def test_faults_of_the_user(study: Any, tmp_path: Path) -> None:
    for flags, message in (
        (["--adapter", "x"], "expected NAME=PATH, not x"),
        (["--adapter", "x=none"], "no folder none: train that adapter first"),
        (["--adapter", "x/y=z"], "expected NAME=PATH"),
        (["--data", "nowhere"], "no nowhere/mt_bench_questions.jsonl: docs/stages.md says"),
        (["--results", "base=none.csv"], "no none.csv"),
    ):
        with pytest.raises(SystemExit, match=message):
            study(*flags)
    for flags in (["--adapter", "base=z"], ["--results", "x=y.csv"]):
        with pytest.raises(SystemExit):
            study(*flags)
    assert not study.calls  # all is checked before the first part is measured
    for flags in ([], ["--plot", "p.svg", "--adapter", "x=y"]):
        with pytest.raises(SystemExit):  # without --base
            forgetting.main(flags)
    with pytest.raises(SystemExit, match="no out.json to draw: measure with --base first"):
        forgetting.main(["--plot", "p.svg", "--output", "out.json"])


def test_given_results_must_answer_the_same(study: Any, tmp_path: Path) -> None:
    study()
    text = Path("results/forgetting/base/results.csv").read_text()
    plain = adapter_folder(str(tmp_path / "model"), tmp_path / "plain")
    Path("given.csv").write_text(text)
    flags = ["--adapter", f"plain={plain}", "--results", "plain=given.csv"]
    found = study(*flags)["models"]["plain"]["task"]
    assert found["paired"]["f1"] == {"difference": 0.0, "standard_error": 0.0}
    assert len(study.calls) == 1
    note = json.loads(Path("results/forgetting/base/results.csv.config.json").read_text())
    write_json(Path("given.csv.config.json"), note)
    for of in ("plain", "base"):  # the note is the base's first
        if of == "base":
            write_json(Path("given.csv.config.json"), note | {"adapter_digest": "another"})
        with pytest.raises(SystemExit, match="given.csv was made by other weights"):
            study("--adapter", f"plain={plain}", "--results", f"{of}=given.csv")
    Path("given.csv.config.json").unlink()
    other = read_results("given.csv")[0]["id"]
    Path("given.csv").write_text(text.replace(f'"{other}"', '"another"'))
    with pytest.raises(SystemExit, match="have not answered the same questions"):
        study(*flags)


def test_paired_errors_of_chat() -> None:
    found = compare_chat([PROSE, PROSE, PROSE, LOST], [PROSE, LOST, LOST, LOST])
    # differences 0, -100, -100, 0
    assert found["paired"]["prose"] == {
        "difference": -50.0, "standard_error": pytest.approx(100 * math.sqrt(1 / 3) / 2),
    }  # fmt: skip
    assert found["prose_kept"]["share"] == pytest.approx(100 / 3)
    # of the tuned less a third of the base's: 2/3, -1/3, -1/3, 0, over the base's share
    spread = statistics.stdev([200 / 3, -100 / 3, -100 / 3, 0]) / 2 / 0.75
    assert found["prose_kept"]["standard_error"] == pytest.approx(spread)
    assert found["paired"]["log_perplexity"]["difference"] == 0.0
    assert compare_chat([LOST, LOST], [PROSE, LOST])["prose_kept"] is None
    same = compare_chat([PROSE, LOST], [PROSE, LOST])
    assert same["prose_kept"] == {"share": 100.0, "standard_error": 0.0}


def point(gain: float, kept: float, *more: str) -> dict[str, Any]:
    paired = {n: {"difference": gain, "standard_error": 1.0} for n in ("% Exact Match", *more)}
    return {
        "task": {"paired": paired},
        "chat": {"prose_kept": {"share": kept, "standard_error": 2.0}},
    }


def span_row(id_: str, golds: list[str], best: str) -> Row:
    """A row that abstains; what else it would say is ``best``."""
    record = {"id": id_, "question": "", "answers": {"text": golds}}
    answer = Answer("no_answer", "?")
    return make_row(record, "", answer, "", 0.5, best_span=best, best_span_log_prob=-1.0,
                    no_answer_log_prob=-1.0)  # fmt: skip


def test_best_spans_are_compared_where_there_is_an_answer() -> None:
    base = [span_row("1", ["x b"], "c"), span_row("2", ["d"], "c"), span_row("3", [], "c")]
    tuned = [span_row("1", ["x b"], "b"), span_row("2", ["d"], "d"), span_row("3", [], "d")]
    found = compare_rows(base, tuned)
    assert found["always_abstaining"] == found["% Exact Match"] == pytest.approx(100 / 3)
    assert found["paired"]["% Exact Match"]["difference"] == 0.0
    assert found["HasAns_span_f1"] == pytest.approx((200 / 3 + 100) / 2)
    difference = found["paired"]["HasAns_span_f1"]
    assert difference["difference"] == pytest.approx((200 / 3 + 100) / 2)
    assert difference["standard_error"] == pytest.approx(100 / 3 / 2)
    free = [row | {"na_prob": None, "best_span": None} for row in tuned]
    assert "HasAns_span_f1" not in compare_rows(base, free)["paired"]  # free decoding tells none


@pytest.mark.parametrize("more", [(), ("HasAns_span_f1",)])
def test_labels_of_near_points_do_not_overlap(
    more: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    names = [f"an adapter called {number}" for number in range(12)]
    base = {"task": {"always_abstaining": 50.0, "% Exact Match": 9.0}} if more else {}
    models: dict[str, Any] = {"base": base} | {
        n: point(0.1 * i, 100 - 0.2 * i, *more) for i, n in enumerate(names)
    }
    plot_forgetting(models | {"not measured": {}}, tmp_path / "p.png")
    panels = drawn[0].axes
    assert len(panels) == 1 + len(more)
    for panel in panels:
        labels = panel.texts[: 1 + len(names)]
        assert [label.get_text() for label in labels] == ["base", *names]
        boxes = [Text.get_window_extent(label) for label in labels]
        for index, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:index])
    edges = [label.get_text() for label in panels[0].texts[1 + len(names) :]]
    assert edges == (["always abstaining "] if more else [])
    with pytest.raises(ValueError, match="no adapter is measured yet"):
        plot_forgetting({"base": {}}, tmp_path / "p.png")
