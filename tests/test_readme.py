"""What README says: its code runs as it stands, offline, and it stays short."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_it_is_short():
    assert len(TEXT.split()) <= 900


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_its_code_runs(number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[number], f"README.md, block {number}", "exec"), {})
    printed = capsys.readouterr().out
    if "jobs.transport" in BLOCKS[number]:
        before, after = map(float, re.findall(r"[\d.]+", printed))
        assert before == pytest.approx(0.30, abs=0.01)
        # "About": rounding decides on the directions just above the rank tolerance, so JAX 0.10 finds 0.47, 0.12 0.44.
        assert after == pytest.approx(0.45, abs=0.05)
    else:
        assert "rotated" in printed


def test_its_links_are_there():
    for place in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert place.startswith("https://") or (README.parent / place).exists(), place
    for document in (README.parent / "docs").glob("*.md"):
        for place in re.findall(r"\]\(([^)]+)\)", document.read_text(encoding="utf-8")):
            assert place.startswith("https://") or (document.parent / place).exists(), (document.name, place)
