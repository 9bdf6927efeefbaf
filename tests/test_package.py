"""What a user meets first: the public names, light imports, and the order of the floors."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

import tvjax

ROOT = Path(tvjax.__file__).parent
# Each floor imports only from those before it.
FLOORS = [
    "processes", "tree", "finite", "arithmetic", "stages", "layers", "capture", "walk", "per_example", "align",
    "transport", "merge", "compose", "models", "sharding", "interop",
    "checkpoints", "data", "tasks", "evaluate", "report", "jobs", "demo", "cli",
]  # fmt: skip


def test_every_public_name_exists_and_has_a_docstring():
    for name in tvjax.__all__:
        assert getattr(tvjax, name).__doc__, name


def test_the_core_imports_neither_flax_nor_what_only_commands_need():
    heavy = "('flax', 'torch', 'transformers', 'matplotlib', 'typer')"
    code = f"import tvjax, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_core_works_without_what_reads_checkpoints_draws_or_serves_commands():
    """README's own model, then arithmetic and a merge, where importing any of these raises an ImportError."""
    heavy = "flax orbax transformers torch huggingface_hub safetensors matplotlib PIL pydantic typer rich yaml".split()
    readme = (ROOT.parent / "README.md").read_text(encoding="utf-8")
    own_model = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    block = f"import sys; sys.modules.update(dict.fromkeys({heavy}))\n"
    further = """
tau = tv.task_vector(source.params, tv.apply(source.params, tau, 2))
assert jax.tree.structure(tv.merge.ties([tau, tv.negate(tau), tv.scale(tau, 0.5)])) == jax.tree.structure(tau)
masked = tv.fit(tv.orthogonal_shift(), source, source, [])
assert tv.orthogonal_shift().apply(masked, tau)["up"]["kernel"].shape == (8, 16)
"""
    done = subprocess.run([sys.executable, "-c", block + own_model + further], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "up/kernel" in done.stdout


def test_importing_is_quick_and_shows_everything():
    code = (
        "import sys, tvjax as tv; assert not {'jax', 'numpy', 'pydantic'} & set(sys.modules), 'not light'; "
        "assert tv.__version__ and set(tv.__all__) <= set(dir(tv)); "
        "tv.load, tv.save, tv.load_task_vector, tv.save_task_vector, tv.tasks.zero_shot, tv.jobs.transport"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_of_the_last_release_work_and_warn():
    with pytest.warns(DeprecationWarning, match="tvjax.Rows is now called Stream"):
        assert tvjax.Rows is tvjax.Stream
    model = tvjax.single_stage(lambda p, x: x @ p["w"], {"w": jnp.eye(3)})
    batches = [tvjax.Batch(jnp.eye(3))]
    with pytest.warns(DeprecationWarning, match="argument host of fit is now called offload"):
        tvjax.fit(tvjax.theseus(), model, model, batches, host=True)
    with pytest.raises(TypeError, match="old name"):
        tvjax.fit(tvjax.theseus(), model, model, batches, host=True, offload=True)
    with pytest.warns(DeprecationWarning, match="argument host of input_grams is now called offload"):
        tvjax.merge.input_grams(model, batches, host=True)
    with pytest.warns(DeprecationWarning, match="transport_stages.* is now called fit.*stream=taus"):
        moved = tvjax.transport_stages(tvjax.theseus(), model, model, batches, [{"w": jnp.ones((3, 3))}])
    assert jnp.allclose(moved[0]["w"], 1, atol=1e-5)
    texts = tvjax.data.Texts("counted", range(10), lambda number: (f"number {number}",), columns=("text",))
    with pytest.warns(DeprecationWarning, match="Texts.part is now called split"):
        assert list(texts.part(0, 0.5)) == list(texts.split(0, 0.5))


def modules():
    return [path for path in sorted(ROOT.rglob("*.py")) if path.parent != ROOT or path.stem in FLOORS]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_floor_imports_only_from_those_above(path):
    floor = FLOORS.index(path.relative_to(ROOT).parts[0].removesuffix(".py"))
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tvjax":
            names += [f"{node.module}.{a.name}" if node.module == "tvjax" else node.module for a in node.names]
        elif isinstance(node, ast.Import):
            names += [a.name for a in node.names if a.name.startswith("tvjax.")]
    imported = {name.split(".")[1] for name in names} & set(FLOORS)
    assert {name for name in imported if FLOORS.index(name) > floor} == set()
