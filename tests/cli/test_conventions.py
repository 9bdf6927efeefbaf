"""What holds for every command: exit codes, one line for an error, JSON and nothing else, progress."""

import io
import json
import pathlib
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from tvjax.cli import output, progress
from tvjax.cli.main import app, run
from tvjax.jobs import InspectConfig


@pytest.fixture
def failing(monkeypatch):
    """`tvjax demo` that raises the given error."""

    def install(error):
        def fail(*_):
            raise error

        monkeypatch.setattr("tvjax.cli.config.read", fail)

    return install


def test_a_fault_is_one_line_and_exit_code_1_and_a_traceback_only_for_debug(failing, capsys):
    failing(KeyError("hidden"))
    assert run(["demo"]) == 1
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert printed.out == "" and "a fault of tvjax" in line and "KeyError: 'hidden'" in line and "--debug" in line
    assert run(["demo", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [(ValueError("no such thing"), 2), (PermissionError(13, "Permission denied", "x"), 2), (OSError(), 2)],
)
def test_bad_input_is_exit_code_2(failing, capsys, error, code):
    failing(error)
    assert run(["demo"]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tvjax: error: ") and len(line) > len("tvjax: error: ")


def test_what_an_error_lists_in_lines_stays_apart_in_one_line(failing, capsys):
    failing(ValueError("2 leaves differ:\n  up: 3 and 4\n  down: 4 and 3\nof another model?"))
    assert run(["demo"]) == 2
    expected = "tvjax: error: 2 leaves differ: up: 3 and 4; down: 4 and 3; of another model?\n"
    assert capsys.readouterr().err == expected


def test_the_way_out_is_said_in_the_words_of_the_command(models, tmp_path, capsys):
    given = ["--pretrained", models["source"], "--finetuned", models["wider"]]
    for words, way_out in (
        (["extract", *given, "--output", str(tmp_path / "tau.safetensors")], "(--part, subtree=...)"),
        (["convert", "model.pt", "--output", str(tmp_path / "out")], "(--like, like=...)"),
        (["convert", models["source"], "--no-scan-layers", "--output", str(tmp_path / "out")], "--scan-layers and"),
        (["merge", "a", "b", "--method", "ties", "--rank", "2", "--dense", "--output", str(tmp_path / "o")], "--dense"),
    ):
        assert run(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert way_out in line and "Value error" not in line, line
    with pytest.raises(ValueError, match=r"^--compare is for two things, found only 'a'"):
        InspectConfig(things="a", compare=True)  # from Python as on the command line, without pydantic's words


def test_an_interrupt_prints_nothing(failing, capsys, monkeypatch):
    failing(KeyboardInterrupt())
    assert run(["demo"]) == 130
    monkeypatch.undo()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tvjax.cli.config.parse_options", interrupt)
    assert run(["merge", "a", "--method", "ties", "--output", "b.safetensors"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_message_is_one_line_and_steers_no_terminal(failing, capsys):
    failing(ValueError("a\nb\u2028c \x1b[31mred\x07 é \udce9"))
    assert run(["demo"]) == 2
    assert capsys.readouterr().err == "tvjax: error: a b c \\x1b[31mred\\x07 é \\udce9\n"


def test_output_that_nobody_reads_is_no_error():
    code = "from tvjax.cli.main import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 141)
    process.stderr.close()


def test_every_command_with_a_result_has_json_and_quiet():
    from typer.main import get_command

    for name, command in get_command(app).commands.items():
        options = {option for parameter in command.params for option in parameter.opts}
        assert "--quiet" in options, name
        assert "--json" in options, name


def test_json_is_one_object_whatever_the_values_are(capsys):
    result = {
        "path": pathlib.Path("a b"),
        "number": np.float32(0.5),
        "array": np.arange(2),
        "nan": float("nan"),
        "row": output._plain({1: (float("inf"), None, True)}),
    }
    output.show(result, "text", as_json=True, quiet=True)
    found = json.loads(capsys.readouterr().out)
    assert found == {"path": "a b", "number": 0.5, "array": [0, 1], "nan": None, "row": {"1": [None, None, True]}}


def test_texts_and_tables_are_printed_unless_quiet(capsys):
    from rich.table import Table

    table = Table("column")
    table.add_row("[bold]value[/bold] " + 100 * "x")
    output.show({}, "[text]", table)
    printed = capsys.readouterr().out
    assert printed.startswith("[text]\n") and 100 * "x" in printed
    output.show({}, "text", table, quiet=True)
    assert capsys.readouterr() == ("", "")


def test_other_processes_print_nothing(monkeypatch, capsys):
    import jax

    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    output.show({}, "text")
    output.show({}, as_json=True)
    with progress.progress("fit", quiet=False) as report:
        report(1, 2, "block")
    assert capsys.readouterr() == ("", "")


def test_progress_is_plain_lines_without_a_terminal_and_nothing_when_quiet(capsys):
    with progress.progress("fit", quiet=False) as report:
        report(1, 2, "block")
    assert capsys.readouterr().err == "fit 1/2: block\n"
    with progress.progress("fit", quiet=True) as report:
        report(1, 2, "block")
    assert capsys.readouterr() == ("", "")


def test_plain_lines_are_few_and_every_round_has_its_last(capsys):
    now = iter(np.arange(0.0, 100.0, 0.01)).__next__
    lines = progress.Lines("merge", clock=now)
    for _ in range(2):
        for step in range(400):
            lines(step + 1, 400, f"leaf {step}")
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) <= 2 * (2 + 400 * 0.01 / progress.PAUSE)
    assert [line for line in printed if " 1/400" in line] == ["merge 1/400: leaf 0"] * 2
    assert any(re.search(r"merge 20\d/400: leaf 20\d \(0:01 left\)", line) for line in printed)
    assert [line for line in printed if "400/400" in line] == ["merge 400/400: leaf 399"] * 2


def test_what_is_compiled_once_is_no_measure_of_the_time_left():
    """The first step waits for one program, the second for that of the blocks; the others take 2 seconds each."""
    pace, now = progress.Pace(0.0), 0.0
    for done, seconds in enumerate((30, 90, *[2] * 20), start=1):
        now += seconds
        left = pace.left(done, 22, now)
        assert left == ("" if done in (1, 2, 22) else f"{(22 - done) * 2 // 60}:{(22 - done) * 2 % 60:02d}")
    assert pace.left(1, 22, now + 1) == ""  # another round


def test_a_silence_is_broken_by_what_is_going_on(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SILENCE", 2.0)
    now = iter(range(100)).__next__  # a second at every look
    lines = progress.Lines("transport", clock=now)
    for _ in range(3):
        lines.still()
    lines(0, 0, "reading a")
    for _ in range(13):
        lines.still()
    lines(1, 3, "block 0")
    for _ in range(2):
        lines.still()
    assert capsys.readouterr().err.splitlines() == [
        *("transport: starting (0:02)", "transport: reading a (0:06)", "transport: reading a (0:10)"),
        *("transport 1/3: block 0", "transport: after 1/3, block 0 (0:20)"),
    ]


def test_the_watch_beside_the_work_speaks_and_ends(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SILENCE", 0.01)
    with progress.progress("merge", quiet=False) as report:
        report(0, 0, "reading")
        threads = [thread for thread in threading.enumerate() if thread.daemon and "watch" in thread.name]
        time.sleep(0.1)
    assert len(threads) == 1 and not threads[0].is_alive()
    assert "merge: reading (0:00)" in capsys.readouterr().err


def test_a_terminal_gets_one_bar_with_the_time_left(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress.Pace, "left", lambda self, done, total, now: "1:23" if done < total else "")
    with progress.progress("[fit]", quiet=False) as report:
        for step in range(3):
            report(step + 1, 3, f"blocks [{step}]")
            if step == 1:
                time.sleep(0.3)  # the bar is drawn ten times a second
    shown = terminal.getvalue()
    assert "[fit]" in shown and "3/3" in shown and "blocks [2]" in shown and "1:23 left" in shown
