"""Whatever stands in a recipe, it is a command or one line that says what is wrong with it."""

import contextlib
import io
import tempfile
from pathlib import Path

import pytest
import typer
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tvjax import jobs
from tvjax.cli.main import run
from tvjax.jobs import recipes as kept

RECIPES = {file.stem: file.read_text() for file in sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))}
NASTY = (
    *("*a", "&a", "!!python/object/apply:os.system [ls]", "!!binary aGk=", "!!set {a}", "<<: *a", "?", "- -", "---"),
    *(".nan", "-.inf", "1e400", "1" * 5000, "-0", "0x7fffffffffff", "1:30", "2020-99-99", "null", "~", "yes"),
    *("'", '"', "{", "}", "[", "]", ": ", "\n", "\t", "|\n", ">-\n", "%YAML 9.9\n"),
    *("\u2028", "\ufeff", "\x85", "é日", "\U0001f600"),
    *("[" * 2000, "{a: " * 500, "command: merge\n", "command: [merge]\n", "scale: 1\nscale: 2\n", "output: {a: 1}\n"),
)  # fmt: skip

texts = st.text(st.characters(codec="utf-8"), max_size=20) | st.sampled_from(NASTY)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3), max_leaves=6
)


@st.composite
def mutated_texts(draw):
    """A recipe that ships, with pieces cut out and others put in."""
    text = draw(st.sampled_from(list(RECIPES.values())))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        stop = min(len(text), start + draw(st.integers(0, 12)))
        text = text[:start] + draw(texts) + text[stop:]
    return text.encode("utf-8", "surrogatepass")


@st.composite
def mutated_values(draw):
    """A recipe that ships, with other values at some keys."""
    recipe = yaml.safe_load(draw(st.sampled_from(list(RECIPES.values()))))
    keys = st.sampled_from([*recipe, "seed", "quiet", "json", "options", "task_vectors", "per_class", "nonsense"])
    recipe |= draw(st.dictionaries(keys, values, min_size=1, max_size=3))
    return yaml.safe_dump(recipe, allow_unicode=draw(st.booleans())).encode("utf-8", "surrogatepass")


recipes = (
    mutated_texts()
    | mutated_values()
    | st.binary(max_size=60)
    | values.map(lambda v: yaml.safe_dump(v).encode("utf-8", "surrogatepass"))
)


def check(content):
    """Runs `tvjax --config` on a recipe; commands that it gives are recorded in the place of run."""
    parsed = []

    def record(config, progress=None):
        parsed.append(yaml.dump(kept.recipe_of(config), Dumper=kept.Dumper, allow_unicode=True))
        raise typer.Exit

    def call(data, *words):
        file.write_bytes(data)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(["--config", str(file), *words])
        return code, out.getvalue(), err.getvalue()

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for name in kept.JOBS:
            patch.setattr(jobs, name, record)
        file = Path(folder) / "recipe.yaml"
        code, out, err = call(content)
        assert out == "" and list(Path(folder).iterdir()) == [file]
        if code == 0:
            assert len(parsed) == 1 and err == ""
            assert call(parsed[0].encode())[0] == 0, parsed[0]
            assert parsed[1] == parsed[0]
        else:
            assert code == 2 and parsed == [] and err.startswith("tvjax: error: "), (code, err)
            assert err.count("\n") == 1 and err.endswith("\n") and len(err) < 10_000


LETTERS = "abcdefghijklmnopqrstuvwxyz"
BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip(LETTERS, LETTERS[1:], strict=False))


@settings(max_examples=100, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(recipes)
@example(BOMB.encode())
@example(b"command: &c {a: *c}")
@example(b"[" * 100_000)
@example(b"\xff\xfe\x00" * 10)
@example(b"command: [merge]")
@example(b"command: merge\ntask_vectors: a.safetensors\nmethod: ties\noutput: 1e9\noptions: {density: 1e-3, t: .nan}")
@example(b"x: " + b"9" * 5000)
@example(b"#" * (2**20 + 1))
def test_a_hundred_recipes(content):
    check(content)


@pytest.mark.fuzz
@settings(max_examples=5000, deadline=None, suppress_health_check=list(HealthCheck))
@given(recipes)
def test_thousands_of_recipes(content):
    check(content)
