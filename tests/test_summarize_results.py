"""The summary stage, through its real command line."""

import csv
import io
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import summarize_results
from llama_squad.answers import extract_answer, format_answer
from llama_squad.metrics import score_table
from llama_squad.results import ResultsFile
from llama_squad.rows import SEED_COLUMNS, make_row

ROOT = Path(__file__).resolve().parents[1]
STAGE = ROOT / "summarize_results.py"


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_results(
    path: str, replies: dict[str, tuple[str, list[str], float | None]], **settings: Any
) -> None:
    with ResultsFile(path, settings) as file:
        rows = []
        for id_, (reply, golds, na_prob) in replies.items():
            record = {"id": id_, "title": "T", "question": "Q", "answers": {"text": golds}}
            completion = format_answer(reply) if reply else "well"
            answer = extract_answer(completion)
            best = None if na_prob is None else reply.replace("?", "best")
            rows.append(make_row(record, completion, answer, "p", na_prob, best_span=best))
        file.append(rows)


BASE: dict[str, tuple[str, list[str], float | None]] = {
    "a": ("x", ["y"], None),
    "b": ("", [], None),
}
TUNED: dict[str, tuple[str, list[str], float | None]] = {
    "a": ("y", ["y"], 0.1),
    "b": ("?", [], 0.9),
}


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    summarize_results.main(argv)
    return capsys.readouterr().out


def fail(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as error:
        summarize_results.main(argv)
    assert error.value.code not in (0, None)
    return f"{error.value.code}{capsys.readouterr().err}"


def test_files_stand_before_flags(capsys: pytest.CaptureFixture[str]) -> None:
    error = fail(capsys, "--na_prob_thresh", "0.5", "late.csv")
    assert "unexpected argument 'late.csv': files stand before the flags" in error


def test_the_bare_command_reads_the_default_file(capsys: pytest.CaptureFixture[str]) -> None:
    write_results("results/results.csv", TUNED)
    lines = run(capsys).splitlines()
    assert lines[:4] == [
        "                    % Valid  % Exact    % EM for  % Correct   % Correct",
        "strict equality  n     JSON    Match  Valid JSON  No Answer  Has Answer",
        "───────────────  ─  ───────  ───────  ──────────  ─────────  ──────────",
        "results          2   100.00   100.00      100.00     100.00      100.00",
    ]
    assert [line.split() for line in lines if line.startswith("results ")][1:] == [
        ["results", "2", *["100.00"] * 6, "0.1000"],
        ["results", "2", *["100.00"] * 3, "10.00"],
    ]
    lines = run(capsys, "--intervals").splitlines()
    two, one = "34.2–100.0", "20.7–100.0"
    assert lines[4].split() == [two, two, two, one, one]
    assert "Wilson's" in lines[-2]


def test_the_table_fits_80_columns_whatever_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    write_results("tuned.csv", TUNED)
    names = [
        "tuned, span decoding",
        "x" * 50,
        "Llama 2 7b chat, fine-tuned single-turn, 8.0 epochs",
    ]
    for flags in ([], ["--intervals"]):
        out = run(capsys, *(f"{name}=tuned.csv" for name in names), *flags)
        assert max(map(len, out.splitlines())) <= 80
        assert all(name in "".join(out.split()) for name in ("single-turn", "x" * 10))
        assert "fine-tuned" in out, "broken at a hyphen"


def test_files_over_different_questions_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    write_results("tuned.csv", TUNED)
    write_results("base.csv", dict(reversed(BASE.items())))  # the same in another order
    assert "Not the same" not in run(capsys, "base.csv", "tuned.csv")
    write_results("part.csv", {"a": TUNED["a"]})
    out = run(capsys, "base.csv", "tuned.csv", "part.csv")
    expected = "Not the same questions, so the rows do not compare:\n  2: base; tuned\n  1: part\n"
    assert out.endswith(expected)
    summarize_results.main(["tuned.csv", "part.csv", "--format=json"])
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)) == 2
    assert captured.err.startswith("Not the same questions")
    write_results("other.csv", {"a": TUNED["a"], "c": TUNED["b"]})  # as many, but others
    out = run(capsys, "tuned.csv", "other.csv")
    assert out.endswith(
        "Not the same questions, so the rows do not compare:\n  2: tuned\n  2: other\n"
    )


def test_paired_differences(capsys: pytest.CaptureFixture[str]) -> None:
    """To the first file, on the questions of both: the normal interval of the differences."""
    golds = {"a": ["y"], "b": ["y z"], "c": [], "d": [], "e": ["y"]}
    base = dict.fromkeys(golds, "?") | {"a": "y"}
    tuned = {"b": "z", "c": "no", "d": "?", "a": "y", "f": "?"}  # in another order; f is new
    for name, replies in (("base", base), ("tuned", tuned)):
        given: dict[str, tuple[str, list[str], float | None]] = {
            id_: (reply, golds.get(id_, []), None) for id_, reply in replies.items()
        }
        write_results(f"{name}.csv", given)
    files = ["base.csv", "again=base.csv", "tuned.csv", "--paired"]
    first, again, other = json.loads(run(capsys, *files, "--format=json"))
    assert "paired" not in first
    assert again["paired"]["n"] == 5 and set(again["paired"]["difference"].values()) == {0.0}
    found = other["paired"]
    assert (found["to"], found["n"]) == ("base", 4)  # a, b, c, d: "z" for "y z" has an F1 of 2/3
    assert (found["became right"], found["became wrong"]) == (0, 1)
    expected: dict[str, list[float]] = {
        "% Exact Match": [0, 0, -1, 0], "exact": [0, 0, -1, 0], "f1": [0, 2 / 3, -1, 0],
        "HasAns_f1": [0, 2 / 3], "NoAns_exact": [-1, 0],
    }  # fmt: skip
    assert found["difference"].keys() == expected.keys()
    for name, changes in expected.items():
        mean = statistics.fmean(changes)
        half = 1.959964 * statistics.stdev(changes) / len(changes) ** 0.5
        assert found["difference"][name] == pytest.approx(100 * mean)
        ends = [100 * (mean - half), 100 * (mean + half)]
        assert found["intervals"][name] == pytest.approx(ends)
    out = run(capsys, *files)
    assert max(map(len, out.splitlines())) <= 80
    lines = [line.split() for line in out.partition("\ndifferences ")[2].splitlines()]
    row = lines.index(["tuned", "4", "-25.00", "-25.00", "-8.33", "+33.33", "-50.00", "0", "1"])
    assert lines[row + 1] == ["±", "49.00", "±", "49.00", "±", "67.34", "±", "65.33", "±", "98.00"]
    rows = list(csv.DictReader(io.StringIO(run(capsys, *files, "--format=csv"))))
    assert (rows[0]["f1 difference"], rows[2]["paired to"]) == ("", "base")
    assert float(rows[2]["f1 difference low"]) == pytest.approx(found["intervals"]["f1"][0])


def test_what_cannot_be_paired_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    write_results("a.csv", {"a": TUNED["a"]})
    write_results("b.csv", {"b": TUNED["b"]})
    assert "have no question in common" in fail(capsys, "a.csv", "b.csv", "--paired")
    assert "give two or more" in fail(capsys, "a.csv", "--paired")
    assert "give two or more" in fail(
        capsys, "--data=a.json", "--predictions=b.json", "--paired", "--results", "a.csv", "b.csv"
    )
    for name in ("one", "two"):  # whose rows of one number may be of two questions
        with Path(f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([SEED_COLUMNS, ["p", '["?"]', "?", "r", "True"]])
    assert "two numbers its rows" in fail(capsys, "a.csv", "two.csv", "--paired")
    assert "one numbers its rows" in fail(capsys, "one.csv", "two.csv", "--paired")


def test_files_that_do_not_name_their_questions_may_hold_the_same(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_results("tuned.csv", TUNED)
    with Path("original.csv").open("w", newline="") as file:
        rows = [["p", '["x"]', "x", "r", "True"]] * 2
        csv.writer(file).writerows([SEED_COLUMNS, *rows])
    out = run(capsys, "tuned.csv", "original.csv")
    assert "\nPerhaps not the same questions, as not all files name them:\n" in out
    write_results("part.csv", {"a": TUNED["a"]})
    assert "Not the same questions" in run(capsys, "part.csv", "original.csv")


def test_plots_what_it_can(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    write_results("tuned.csv", TUNED)
    write_results("base.csv", BASE)
    summarize_results.main(["base.csv", "tuned.csv", "--plot", "plots"])
    assert capsys.readouterr().err == "No plot of base.csv: some rows have no na_prob.\n"
    assert [path.name for path in Path("plots").iterdir()] == ["tuned.png"]


def test_plots_are_in_log_odds_and_legends_cover_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure_module = pytest.importorskip("matplotlib.figure")
    from llama_squad.plots import plot_na_probs

    figures = []
    save = figure_module.Figure.savefig

    def watched(self: Any, *options: Any, **more: Any) -> None:
        figures.append(self)
        save(self, *options, **more)

    monkeypatch.setattr(figure_module.Figure, "savefig", watched)
    golds: dict[str, list[str]] = {"a": ["x"], "b": [], "c": ["x"]}
    na_probs = {"a": 0.0, "b": 1.0, "c": 0.001}
    table = score_table(golds, dict.fromkeys(golds, "x"), na_probs)
    plot_na_probs(table, tmp_path / "p.png", "p")
    panels = figures[0].axes
    assert [panel.get_xscale() for panel in panels] == ["logit"] * 2 + ["linear"] * 3
    assert sum(patch.get_height() for patch in panels[1].patches) == 3, "0 and 1 are drawn, too"
    points = panels[2].collections[0].get_offsets().tolist()
    assert points == [[0.0005, 0.0], [1.0, 100.0]]
    for panel in panels:
        assert panel.get_legend().get_window_extent().y1 < panel.get_window_extent().y0


def test_a_picture_of_what_is_no_probability(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from llama_squad.plots import plot_na_probs

    golds: dict[str, list[str]] = {"a": ["x"], "b": []}
    plot_na_probs(
        score_table(golds, dict.fromkeys(golds, "x"), {"a": -3.0, "b": 2.0}),
        tmp_path / "p.png",
        "p",
    )
    assert (tmp_path / "p.png").is_file()


def test_several_files_give_several_rows(capsys: pytest.CaptureFixture[str]) -> None:
    write_results("tuned/results.csv", TUNED)
    write_results("base.csv", BASE)
    rows = json.loads(run(capsys, "tuned/results.csv", "base.csv", "--format", "json"))
    assert [r["name"] for r in rows] == ["tuned", "base"]
    assert [r["% Exact Match"] for r in rows] == [100.0, 0.0]
    assert [r["states"]["malformed"] for r in rows] == [0, 1]
    assert [r.get("best_exact_thresh") for r in rows] == [0.1, None]
    flags = run(capsys, "--results", "B=base.csv", "T=tuned/results.csv", "--format=json")
    assert [r["name"] for r in json.loads(flags)] == ["B", "T"]


def test_json_says_how_a_file_was_made(capsys: pytest.CaptureFixture[str]) -> None:
    write_results("tuned.csv", TUNED, num_beams=4, commit="abc")
    write_results("base.csv", BASE)
    Path("base.csv.config.json").unlink()
    rows = json.loads(run(capsys, "tuned.csv", "base.csv", "--format=json"))
    assert [row["settings"] for row in rows] == [{"num_beams": 4, "commit": "abc"}, {}]
    for form in ("csv", "table"):
        assert "num_beams" not in run(capsys, "tuned.csv", "--format", form)


def test_csv_and_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    write_results("tuned.csv", TUNED)
    write_results("base.csv", BASE)
    out = run(capsys, "base.csv", "tuned.csv", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [r["name"] for r in rows] == ["base", "tuned"]
    assert [r["% Valid JSON"] for r in rows] == ["50.0", "100.0"]
    assert [r["best_exact"] for r in rows] == ["", "100.0"]
    assert float(rows[1]["exact low"]) == pytest.approx(34.238023)
    markdown = run(capsys, "pipe|d=base.csv", "tuned.csv", "--format", "markdown").splitlines()
    assert markdown[1].count("|") == markdown[0].count("|") == 8
    assert all("-" in cell for cell in markdown[1].split("|")[1:-1]), "else it is no table"
    assert markdown[2].startswith("| pipe\\|d ")
    assert markdown[5].startswith("| official SQuAD 2.0 ")
    assert [cell.strip() for cell in markdown[7].split("|")][-3:] == ["–", "–", ""]


def test_another_threshold(capsys: pytest.CaptureFixture[str]) -> None:
    write_results("tuned.csv", TUNED)
    keys = ("exact", "NoAns_exact", "best_exact", "best_exact_thresh")
    seen = {}
    for threshold in ("0.05", "0.5", "0.95"):
        out = run(capsys, "tuned.csv", "--na_prob_thresh", threshold, "--format=json")
        seen[threshold] = [json.loads(out)[0][key] for key in keys]
    assert seen == {
        "0.05": [50.0, 100.0, 100.0, 0.1],
        "0.5": [100.0, 100.0, 100.0, 0.1],
        "0.95": [50.0, 0.0, 100.0, 0.1],
    }


def test_failed_questions_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    write_results("server.csv", BASE)
    text = Path("server.csv").read_text().replace('"malformed"', '"failed"')
    Path("server.csv").write_text(text)
    note = "Questions without a reply, which count as wrong: 1 of server.\n"
    assert run(capsys, "server.csv").endswith(note)
    assert json.loads(run(capsys, "server.csv", "--format=json"))[0]["states"]["failed"] == 1
    write_results("base.csv", BASE)
    assert "without a reply" not in run(capsys, "base.csv")


def test_files_of_one_name_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("one", "two"):
        write_results(f"{folder}/run.csv", BASE)
    rows = json.loads(run(capsys, "one/run.csv", "two/run.csv", "--format", "json"))
    assert [r["name"] for r in rows] == ["one/run.csv", "two/run.csv"]
    write_results("v1.0", BASE)
    assert json.loads(run(capsys, "v1.0", "--format", "json"))[0]["name"] == "v1.0"
    assert "two result files have one name" in fail(capsys, "a=one/run.csv", "a=one/run.csv")


def test_output_and_config_file(capsys: pytest.CaptureFixture[str]) -> None:
    write_results("mine.csv", TUNED)
    Path("config.yaml").write_text(
        "model_name: unused\nsummarize:\n  results: [M=mine.csv]\n  format: json\n"
    )
    out = run(capsys, "--output", "new/summary.json")
    assert json.loads(out)[0]["name"] == "M"
    assert Path("new/summary.json").read_text() == out
    assert run(capsys, "--format", "csv").startswith("name,n,")
    Path("config.yaml").write_text("summarize:\n  formt: json\n")
    assert "formt" in fail(capsys) and "format" in fail(capsys)


def test_official_form(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    squad = shared_data / "squad_v2"
    flags = ["--data", str(squad / "dev.json"), "--format", "json", "--predictions"]
    flags.append(str(squad / "predictions" / "bert_single.json"))
    vectors = json.loads((squad / "expected_scores.json").read_text())["vectors"]
    figures = json.loads(run(capsys, *flags))
    assert figures == pytest.approx(vectors["bert_single"]["scores"], rel=0, abs=1e-9)
    flags += ["--na_prob", str(squad / "predictions" / "bert_single.na_prob.json")]
    figures = json.loads(run(capsys, *flags, "--na_prob_thresh", "0.25"))
    expected = vectors["bert_single_with_synthetic_na_prob_t0.25"]["scores"]
    assert figures == pytest.approx(expected, rel=0, abs=1e-9)


def write_official_files() -> None:
    qas = [{"id": "a", "answers": [{"text": "x"}]}, {"id": "b", "answers": []}]
    Path("d.json").write_text(json.dumps({"data": [{"paragraphs": [{"qas": qas}]}]}))
    Path("p.json").write_text('{"a": "x", "b": ""}')
    Path("n.json").write_text('{"a": 0.1, "b": 0.9}')


def test_official_form_in_other_formats(capsys: pytest.CaptureFixture[str]) -> None:
    write_official_files()
    flags = ["--data", "d.json", "--predictions", "p.json"]
    assert run(capsys, *flags).splitlines()[2].split() == ["exact", "100.0"]
    assert run(capsys, *flags, "--format=csv").splitlines()[0].startswith("exact,f1,total,HasAns")


def test_plots(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    write_results("tuned.csv", TUNED)
    write_official_files()
    run(capsys, "t/u=tuned.csv", "--plot", "plots")
    run(capsys, "--data=d.json", "--predictions=p.json", "--na_prob=n.json", "--plot=plots")
    assert sorted(path.name for path in Path("plots").iterdir()) == ["p.png", "t_u.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in Path("plots").iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "cannot read results/results.csv: No such file"),
        (["empty.csv"], "empty.csv is damaged or no result file: it is empty"),
        (["d.json"], "d.json is damaged or no result file"),
        (["base.csv", "--plot", "x"], "no --plot of base.csv: some rows have no na_prob"),
        (
            ["base.csv", "--na_prob_thresh", "0.5"],
            "cannot be applied to base.csv: question a has no",
        ),
        (["base.csv", "--na_prob_thresh", "nan"], "--na_prob_thresh is a probability, not nan"),
        (["base.csv", "--na_prob_thresh", "5"], "--na_prob_thresh is a probability, not 5.0"),
        (
            ["--predictions", "p.json", "--data", "d.json", "--na_prob_thresh", "nan"],
            "is a probability, not nan",
        ),
        (["base.csv", "--output", "."], "cannot write .: Is a directory; choose another place"),
        (["--data", "d.json"], "need --predictions"),
        (["--predictions", "p.json"], "--predictions needs --data"),
        (["--predictions", "p.json", "--data", "no.json"], "cannot read no.json"),
        (["--predictions", "empty.csv", "--data", "d.json"], "empty.csv is no JSON file"),
        (["--predictions", "n.json", "--data", "d.json"], "question a is 0.1, not a string"),
        (["--predictions", "p.json", "--data", "p.json"], "not in the official SQuAD form"),
        (["--predictions", "p.json", "--data", "d.json", "--plot", "x"], "give --na_prob"),
        (["base.csv", "--output", "./base.csv"], "--output ./base.csv is read: name another file"),
        (["B=base.csv", "--output", "base.csv"], "--output base.csv is read"),
        (["--predictions", "p.json", "--data", "d.json", "--output=d.json"], "d.json is read"),
        (["base.csv", "--predictions", "p.json", "--data", "d.json"], "and the result files"),
        (["--predictions", "p.json", "--data", "d.json", "--intervals"], "leave out --intervals"),
        (["--formt", "json"], "did you mean --format?"),
        (["--format", "xml"], "invalid choice: 'xml'"),
    ],
)
def test_errors_name_what_is_wrong(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_results("base.csv", BASE)
    write_official_files()
    Path("empty.csv").touch()
    assert message in fail(capsys, *argv)


def test_a_recipe_may_name_result_files_that_predictions_pass_over(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_official_files()
    Path("c.yaml").write_text("summarize: {results: [r.csv], intervals: true}")
    out = run(capsys, "--config", "c.yaml", "--data", "d.json", "--predictions", "p.json")
    assert "exact" in out


def processor_seconds(*command: Any) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run a command; return what it printed and the processor seconds it took.

    Other work on the machine stretches the seconds of the clock, but hardly those.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def run_stage(*argv: str) -> tuple[str, float]:
    """Run the stage in a process of its own, which must load nothing large."""
    done, seconds = processor_seconds("-X", "importtime", STAGE, *argv)
    assert "json" in done.stderr  # the list of imported modules
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not modules & {"torch", "pandas", "matplotlib", "datasets"}
    return done.stdout, seconds


YARDSTICK = """
import csv, hashlib, json, sys
for _ in range(4):
    for row in csv.reader(open(sys.argv[1], newline="")):
        hashlib.sha256(json.dumps(row).encode()).digest()
"""
"""Four plain passes over a file: what a machine's speed is told by."""


def test_as_many_rows_as_dev_has_take_a_few_plain_passes_and_no_torch() -> None:
    """As a ratio to plain passes in the same run: seconds are another machine's."""
    with ResultsFile("results/results.csv", {}) as file:
        rows = []
        for number in range(11_873):
            golds = [f"the answer {number}", f"answer {number}", "some words more"][: number % 4]
            completion = format_answer(golds[0] if golds else "?")
            record = {"id": str(number), "title": "", "question": "q" * 60,
                      "answers": {"text": golds}}  # fmt: skip
            answer = extract_answer(completion)
            rows.append(make_row(record, completion, answer, "prompt\n" * 200, 0.5, score=-1.0))
        file.append(rows)
    plain = processor_seconds("-c", YARDSTICK, "results/results.csv")[1]
    out, seconds = run_stage("--format", "json")
    assert json.loads(out)[0]["exact"] == 100.0
    assert json.loads(out)[0]["n"] == 11_873
    assert seconds < 2.5 * plain
    out, seconds = run_stage("--help")
    assert "--na_prob_thresh" in out
    assert seconds < 1.2 * plain
