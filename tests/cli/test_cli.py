import re
import subprocess
import sys

import pytest

from tvjax.cli.main import run

COMMANDS = ("demo", "transport", "evaluate", "extract", "apply", "merge", "compose", "inspect")


def move(models, target, method, output, *more):
    folders = {"source": models["source"], "finetuned": models["finetuned"], "target": models[target]}
    options = [text for name, value in folders.items() for text in (f"--{name}", value)]
    return run(["transport", *options, "--method", method, "--output", str(output), *map(str, more)])


def one_line_of(capsys):
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = [line for line in printed.err.splitlines() if line.startswith("tvjax: error: ")]
    assert "Traceback" not in printed.err
    return line


def test_help_lists_the_commands_and_loads_nothing_heavy():
    code = (
        "import sys\nfrom tvjax.cli.main import run\nassert run(['--help']) == 0\n"
        "print(sorted({'jax', 'flax', 'transformers', 'matplotlib', 'scipy'} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(f"\n  {command} " in printed for command in COMMANDS)
    assert printed.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    assert run([command, "--help"]) == 0
    assert "Usage: tvjax " + command in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command"),
        (["nonsense"], "No such command 'nonsense'"),
        (["demo", "--nonsense"], "No such option"),
        (["transport", "--source", "a"], "Missing option"),
        (["evaluate", "/no/such/model", "--images", "/no/such/images"], "'/no/such/model' is no folder"),
    ],
)
def test_nonsense_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert run(arguments) == 2
    assert message in one_line_of(capsys)


@pytest.mark.parametrize(
    ("target", "method", "message"),
    [
        ("wider", "nonsense", "there is no method 'nonsense': choose among naive"),
        ("wider", "gradfix+bico", "put bico first"),
        ("wider", "gradfix", "gradfix needs towers of one shape: hidden_size is 8 in .* and 12"),
        ("wider", "naive", "naive needs towers of one shape"),
        ("finetuned", "bico", "has no text tower to make a zero-shot head from: give the full model"),
        ("wider", "bico", "bico looks at calibration images: give --data"),
    ],
)
def test_what_cannot_be_is_said_before_any_weight_is_read(
    models, tmp_path, capsys, monkeypatch, target, method, message
):
    monkeypatch.setattr("tvjax.checkpoints.reader.Tensors.read_into", lambda *_: pytest.fail("weights were read"))
    assert move(models, target, method, tmp_path / "out") == 2
    line = one_line_of(capsys)
    assert re.search(message, line), line
    assert list(tmp_path.iterdir()) == []


def test_bico_without_labels(models, images, tmp_path, capsys):
    assert move(models, "wider", "bico", tmp_path / "out", "--images", images / "cat") == 2
    assert "has no labels, and bico reads gradients" in (line := one_line_of(capsys)) and "or take theseus" in line
    assert list(tmp_path.iterdir()) == []


def test_bad_files_are_one_line(models, images, tmp_path, capsys):
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    (tmp_path / "prompts.txt").write_text("a photo\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    evaluate = ["evaluate", models["same"], "--images", str(images)]
    for arguments, message in (
        ([*evaluate, "--classes", str(tmp_path / "classes.txt")], "'polar bear'.*none of the classes"),
        ([*evaluate, "--templates", str(tmp_path / "prompts.txt")], "'a photo' has no '{}'"),
        ([*evaluate, "--templates", str(tmp_path / "none.txt")], "there is no file"),
        ([*evaluate, str(tmp_path / "broken")], "config.json is no JSON"),
        (
            ["apply", str(tmp_path / "classes.txt"), "--model", models["same"], "--output", str(tmp_path / "o")],
            "safetensors",
        ),
        (["demo", "--output", str(tmp_path / "classes.txt")], "is a file, or lies below one: give a folder"),
    ):
        assert run(arguments) == 2
        line = one_line_of(capsys)
        assert re.search(message, line), line
    assert move(models, "same", "naive", tmp_path / "taken") == 2
    assert "exists: give a new folder" in one_line_of(capsys)
    assert not (tmp_path / "o").exists()


def test_debug_shows_the_traceback(tmp_path, capsys):
    assert run(["evaluate", str(tmp_path), "--images", str(tmp_path), "--debug"]) == 2
    printed = capsys.readouterr().err
    assert "Traceback" in printed and "has no config.json" in printed.splitlines()[-1]
