"""Replace SQuAD 2.0's questions by Disfl-QA's: as people say them, with slips.

Disfl-QA (Gupta et al. 2021) has a spoken wording for questions of SQuAD 2.0, by their ids. This
writes two files in SQuAD's format with the same questions in the same order: ``plain.json``, as
SQuAD has them, and ``disfluent.json``. Samples of one seed are then of the same questions, so the
figures can be compared in pairs.

    python benchmarks/disfl_qa.py --squad dev-v2.0.json --disfl_qa dev.json --output_dir DIR
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--squad", required=True, help="SQuAD 2.0 dev, the official JSON")
    parser.add_argument("--disfl_qa", required=True, nargs="+", help="Disfl-QA's JSON files")
    parser.add_argument("--output_dir", required=True)
    return parser.parse_args(argv)


def read_json(path: str) -> Any:
    """Read a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def select(squad: Mapping[str, Any], questions: Mapping[str, str]) -> dict[str, Any]:
    """Return SQuAD's content with the questions of these ids alone, worded as given."""

    def keep(nodes: list[Any], inner: str, change: Callable[[Any], Any]) -> list[Any]:
        changed = [{**node, inner: change(node[inner])} for node in nodes]
        return [node for node in changed if node[inner]]

    def reword(qas: list[Any]) -> list[Any]:
        return [{**qa, "question": questions[qa["id"]]} for qa in qas if qa["id"] in questions]

    articles = keep(squad["data"], "paragraphs", lambda found: keep(found, "qas", reword))
    return {**squad, "data": articles}


def main(argv: Sequence[str] | None = None) -> None:
    """Write both files."""
    args = parse(argv)
    squad = read_json(args.squad)
    said = {key: value for path in args.disfl_qa for key, value in read_json(path).items()}
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    plain = {
        qa["id"]: qa["question"]
        for article in squad["data"]
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
        if qa["id"] in said
    }
    disfluent = {key: said[key]["disfluent"] for key in plain}
    for name, questions in (("plain", plain), ("disfluent", disfluent)):
        content = json.dumps(select(squad, questions), ensure_ascii=False)
        (folder / f"{name}.json").write_text(content, encoding="utf-8")
    print(f"Wrote {folder}/plain.json and disfluent.json: {len(plain):,} questions each")


if __name__ == "__main__":
    main()
