"""Fixtures that several tests share."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
os.environ["HF_HUB_OFFLINE"] = "1"  # read when its library is imported; without, it tries for long


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
