"""Fixtures that several tests share."""

import gc
import os
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
os.environ["HF_HUB_OFFLINE"] = "1"  # read when its library is imported; without, it tries for long


def pytest_collection_finish() -> None:
    """Let each collection of garbage pass over what the imports made: a trainer calls for many."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for further spans among few: a model of random weights prefers none."""
    monkeypatch.setattr("llama_squad.decoding.search.N_BEST_BEAMS", 2)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the replies of the chat check to a few tokens."""
    from llama_squad import chat_check

    answer = chat_check.answer_greedily

    def cut(model: Any, encoder: Any, prompts: Any, _: int) -> Any:
        return answer(model, encoder, prompts, 12)

    monkeypatch.setattr(chat_check, "answer_greedily", cut)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Train in an empty folder, with no token for the Hub; validation's replies are short."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("llama_squad.training.setup.VALIDATION_TOKENS", 8)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; its README.md says what it holds."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the real data is not here: {folder}")
    return folder
