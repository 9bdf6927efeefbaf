"""Kills processes at random moments of a write, and checks that what stands at the target is the old or the new whole.

A child is forked for each kill, writes (over what the round before left, or into a new folder), and gets SIGKILL after
a random part of the time that the write takes. Then the target must be read without error and be one of the two
contents that it may have; a new folder may also be absent. What a killed write leaves beside its target, the next write
to it must remove.

    python scripts/kill_writes.py                 # 200 kills
    python scripts/kill_writes.py --kills 8 --megabytes 1
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tvjax import tree
from tvjax.checkpoints import Pretrained, fingerprint, map_tree, save_pretrained, save_tree, streaming
from tvjax.checkpoints.folder import open_checkpoint
from tvjax.checkpoints.memory import Scratch
from tvjax.models.clip import CLIPConfig, CLIPVisionConfig, clip
from tvjax.models.transformer import parameter_shapes


class Case(NamedTuple):
    """A write, and what may stand at its target afterwards."""

    target: Path
    write: Callable[[], object]
    identity: Callable[[], str]  # of what stands at the target; raises where it is corrupt
    allowed: set[str]
    fresh: bool  # the target is removed before each round


def make_cases(folder: Path, megabytes: float) -> dict[str, Case]:
    width = max(8, int((megabytes * 1e6 / 4 / 24) ** 0.5) // 8 * 8)
    config = CLIPConfig(CLIPVisionConfig(width, 4 * width, 2, 2, image_size=8, patch_size=4, projection_dim=8), None)
    shapes = parameter_shapes(clip(config, {}).stages)

    def params(seed: int) -> dict[str, Any]:
        rng = np.random.default_rng(seed)
        return tree.nest({path: rng.standard_normal(shape, np.float32) for path, shape in shapes.items()})

    models = [Pretrained(clip(config, params(seed)), config) for seed in range(3)]
    for number, model in enumerate(models):
        save_pretrained(model, folder / f"model{number}")
    tau = folder / "tau.safetensors"
    streaming.extract(folder / "model0", folder / "model1", tau)
    identities = [fingerprint(model.params) for model in models]

    def of_file(path: Path) -> str:
        return fingerprint(map_tree(path)[0])

    def of_folder(path: Path) -> str:
        scratch = Scratch()
        with open_checkpoint(path) as opened:
            return fingerprint(tree.nest({leaf: opened.read(leaf, scratch).copy() for leaf in opened.shapes}))

    def random_model() -> Pretrained:
        return models[random.randrange(2)]

    file, replaced, edited, extracted = (folder / name for name in ("file", "replaced", "edited", "extracted"))
    save_tree(file, models[0].params)
    save_pretrained(models[0], replaced)
    streaming.apply(folder / "model0", [tau], edited)
    streaming.extract(folder / "model0", folder / "model1", extracted)
    taus = {of_file(extracted)}
    streaming.extract(folder / "model0", folder / "model2", extracted)
    taus |= {of_file(extracted)}
    other = [folder / "model1", folder / "model2"]
    return {
        "save_tree": Case(
            file, lambda: save_tree(file, random_model().params), lambda: of_file(file), set(identities[:2]), False
        ),
        "save_pretrained": Case(
            replaced,
            lambda: save_pretrained(random_model(), replaced),
            lambda: of_folder(replaced),
            set(identities[:2]),
            False,
        ),
        "extract": Case(
            extracted,
            lambda: streaming.extract(folder / "model0", other[random.randrange(2)], extracted),
            lambda: of_file(extracted),
            taus,
            False,
        ),
        "apply": Case(
            edited,
            lambda: streaming.apply(folder / "model0", [tau], edited, max_shard_size=2**20),
            lambda: of_folder(edited),
            {of_folder(edited)},
            True,
        ),
    }


def fork(write: Callable[[], object]) -> int:
    """The id of a child that writes and ends."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        random.seed(os.getpid())
        write()
        code = 0
    finally:
        os._exit(code)


def left_of(case: Case) -> list[Path]:
    """What killed writes of a case left."""
    beside = case.target.parent.glob(f".{case.target.name}.*.partial")
    return [*beside, *(case.target.glob(".*.partial") if case.target.is_dir() else ())]


def kill_once(case: Case, seconds: float) -> str:
    """Kills one write; says what stood at the target, or raises."""
    if case.fresh:
        shutil.rmtree(case.target, ignore_errors=True)
    before = set(left_of(case))
    child = fork(case.write)
    time.sleep(random.uniform(0, 1.5 * seconds))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) not in (0, -signal.SIGKILL):
        raise SystemExit("a child failed by itself")
    partial = set(left_of(case)) - before
    if case.fresh and not case.target.exists():
        return "absent"
    if case.identity() not in case.allowed:
        raise SystemExit(f"{case.target} holds neither the old nor the new content")
    return "whole, killed while writing" if partial else "whole"


def main() -> None:
    """Runs the kills and prints what stood at the targets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--megabytes", type=float, default=20, help="size of a model")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        cases = make_cases(Path(name), arguments.megabytes)
        times = {}
        for title, case in cases.items():
            if case.fresh:
                shutil.rmtree(case.target)
            start = time.perf_counter()
            _, status = os.waitpid(fork(case.write), 0)
            times[title] = time.perf_counter() - start
            if status:
                raise SystemExit(f"{title} failed")
        found: dict[str, collections.Counter[str]] = {title: collections.Counter() for title in cases}
        for number in range(arguments.kills):
            title = list(cases)[number % len(cases)]
            found[title][kill_once(cases[title], times[title])] += 1
        for title, case in cases.items():
            if case.fresh:
                shutil.rmtree(case.target, ignore_errors=True)
            _, status = os.waitpid(fork(case.write), 0)
            if status or left_of(case):
                raise SystemExit(f"{title} left {', '.join(map(str, left_of(case)))}")
    for title, counts in found.items():
        print(f"{title:<16} {times[title]:.3f} s  " + ", ".join(f"{what}: {n}" for what, n in sorted(counts.items())))
    print(f"{arguments.kills} kills, no corrupt target")


if __name__ == "__main__":
    main()
