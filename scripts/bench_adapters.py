"""Moving an adapter as its two factors beside moving its dense product, at width 2048.

One kernel [2048, 2048] goes through a Theseus state with random orthogonal maps of full rank on both sides. Dense and
low rank are timed in turn in one process, several times each, and the ratio of each pair counts (its median), so that
other load on the machine meets both. Bytes are those of the compiled program: its arguments apart from the maps, what
it returns, and its workspace.

    python scripts/bench_adapters.py                      # ranks 4 to 64
    python scripts/bench_adapters.py --width 512 --repeats 3 --output /tmp/bench.json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tvjax import LowRank, State, theseus
from tvjax.align.procrustes import OrthogonalMap
from tvjax.transport.base import LeafUse, LinkState, Rule

RANKS = (4, 8, 16, 32, 64)
GOAL = 5.0  # times faster at rank 16


def fitted(width: int, key: jax.Array) -> State:
    """A state of Theseus for one kernel ``w``, with random orthogonal maps."""

    def rotation(key: jax.Array) -> OrthogonalMap:
        matrix = jnp.linalg.qr(jax.random.normal(key, (width, width)))[0]
        return OrthogonalMap(matrix, jnp.eye(width), jnp.int32(width))

    use = LeafUse("dense", (), (), "in", "out")
    rule = Rule("w", "w", "rotated", (width, width), (width, width), (use,))
    maps = dict(zip(("in", "out"), map(rotation, jax.random.split(key)), strict=True))
    return State((LinkState("theseus", maps, {}, (rule,)),), jax.tree.structure({"w": 0}), ("w",), ("w",))


def adapter(width: int, rank: int, key: jax.Array) -> dict[str, Any]:
    """A random adapter of the kernel."""
    left, right = jax.random.split(key)
    return {"w": LowRank(jax.random.normal(left, (width, rank)), jax.random.normal(right, (rank, width)))}


def measure(width: int, rank: int, repeats: int, state: State, key: jax.Array) -> dict[str, Any]:
    """Paired timings of both ways for one rank."""
    transport = theseus()
    low = adapter(width, rank, key)
    whole = {"w": jnp.asarray(low["w"])}
    compiled = {
        name: jax.jit(transport.apply).lower(state, tau).compile() for name, tau in (("low", low), ("dense", whole))
    }

    def seconds(name: str, tau: Any) -> float:
        started = time.perf_counter()
        jax.block_until_ready(compiled[name](state, tau))
        return time.perf_counter() - started

    error = jnp.linalg.norm(jnp.asarray(compiled["low"](state, low)["w"]) - compiled["dense"](state, whole)["w"])
    pairs = [(seconds("low", low), seconds("dense", whole)) for _ in range(repeats + 1)][1:]
    ratios = sorted(dense / factored for factored, dense in pairs)
    maps = sum(leaf.nbytes for leaf in jax.tree.leaves(state))

    def size(name: str) -> int:
        memory = compiled[name].memory_analysis()
        return memory.argument_size_in_bytes - maps + memory.output_size_in_bytes + memory.temp_size_in_bytes

    return {
        "width": width,
        "rank": rank,
        "low_rank_seconds": statistics.median(factored for factored, _ in pairs),
        "dense_seconds": statistics.median(dense for _, dense in pairs),
        "times_faster": statistics.median(ratios),
        "times_faster_range": [ratios[0], ratios[-1]],
        "low_rank_bytes": size("low"),
        "dense_bytes": size("dense"),
        "relative_difference": float(error / jnp.linalg.norm(whole["w"])),
        **({"goal": GOAL} if rank == 16 else {}),
    }


def line(result: dict[str, Any]) -> str:
    """A result as one line of text."""
    low, dense = (f"{1e3 * result[f'{way}_seconds']:.2f} ms" for way in ("low_rank", "dense"))
    small, large = (f"{result[f'{way}_bytes'] / 2**20:.2f} MiB" for way in ("low_rank", "dense"))
    goal = f"   goal {result['goal']:g} x" if "goal" in result else ""
    return (
        f"rank {result['rank']:>3}   {low:>12} {small:>12}   dense {dense:>12} {large:>12}"
        f"   {result['times_faster']:7.1f} x{goal}"
    )


def main() -> None:
    """Measures every rank and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--ranks", type=int, nargs="*", default=list(RANKS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("results/bench_adapters.json"))
    arguments = parser.parse_args()
    key, of_adapter = jax.random.split(jax.random.key(0))
    state = fitted(arguments.width, key)
    results = []
    for rank in arguments.ranks:
        results.append(measure(arguments.width, rank, arguments.repeats, state, of_adapter))
        print(line(results[-1]), flush=True)
    versions = {package: importlib.metadata.version(package) for package in ("jax", "jaxlib", "numpy")}
    processor = platform.processor() or platform.machine()
    machine = {"cores": os.cpu_count(), "processor": processor, "python": platform.python_version()}
    report = {"versions": versions, "machine": machine, "repeats": arguments.repeats, "results": results}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = arguments.output.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(arguments.output)


if __name__ == "__main__":
    main()
