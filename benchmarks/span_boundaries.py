"""Count the gold answers that spans at word boundaries cannot say, over a whole dataset.

Those are the price of ``--span_boundaries word``, the default of evaluation; with ``any`` there are
none. Reads a folder that ``create_squad_dataset.py`` wrote.

    python benchmarks/span_boundaries.py [data/squad_v2]      # half a minute
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from llama_squad.data import load_squad
from llama_squad.decoding.boundaries import is_span


def main(dataset_name: str = "data/squad_v2") -> None:
    """Print one line per split: distinct gold answers, and answerable questions, out of reach."""
    for name, split in load_squad(dataset_name).items():
        golds = lost = questions = mute = 0
        for row in split.select_columns(["context", "answers"]):
            texts = set(row["answers"]["text"])
            reached = sum(is_span(row["context"], text, "word") for text in texts)
            golds, lost = golds + len(texts), lost + len(texts) - reached
            questions, mute = questions + bool(texts), mute + (bool(texts) and not reached)
        print(
            f"{name}: {lost:,} of {golds:,} gold answers are no spans at word boundaries; of "
            f"{questions:,} answerable questions {mute:,} have no other"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
