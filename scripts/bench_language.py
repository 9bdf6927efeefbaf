"""Time and memory of transports between two language models of real size, with random weights in bfloat16.

Llamas of the shape of TinyLlama 1.1B (22 blocks, width 2048, 32 query heads on 4 key heads), 8 texts of 128 tokens:

- ``theseus``: `tvjax.theseus` with a quarter of the rank, streamed, moved leaves given away as they are made
  (``fit(..., stream=[tau], write=...)``); models and task vector are in memory (`scripts/bench_streaming.py` leaves
  them on disk).
- ``gradfix``: `tvjax.gradfix` beside one plain forward and backward pass of the same texts in the same process.

Each case runs in a process of its own, so that its peak memory is its own.

    python scripts/bench_language.py                        # both; an hour on two cores with --blocks 22
    python scripts/bench_language.py theseus --blocks 4     # fewer blocks: time grows with them, compiling does not
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CASES = ("theseus", "gradfix")
GIB = 2.0**30


def llama(seed: int, blocks: int, width: int, on_device: bool = False) -> Any:
    """A random Llama with the loss of the next token; weights are drawn on the host unless an accelerator shall."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from tvjax.models.llama import LlamaConfig, init
    from tvjax.models.llama import llama as build
    from tvjax.tasks.language import NEXT_TOKEN

    config = LlamaConfig(
        vocab_size=32000 if width == 2048 else 500, hidden_size=width, intermediate_size=11 * width // 4,
        num_hidden_layers=blocks, num_attention_heads=width // 64, num_key_value_heads=width // 512 or 1, head_dim=64,
        tie_word_embeddings=False,
    )  # fmt: skip
    random = np.random.default_rng(seed)
    normal = jax.jit(jax.random.normal, static_argnums=(1, 2))

    def leaf(like: Any) -> Any:
        if len(like.shape) < 2:
            return jnp.ones(like.shape, jnp.bfloat16)
        if on_device:
            made = normal(jax.random.key(int(random.integers(2**31))), like.shape, jnp.bfloat16)
            return made / jnp.asarray(like.shape[0] ** 0.5, jnp.bfloat16)
        made = random.standard_normal(like.shape, np.float32) / np.sqrt(like.shape[0], dtype=np.float32)
        return jnp.asarray(made, jnp.bfloat16)

    params = jax.tree.map(leaf, jax.eval_shape(lambda key: init(config, key), jax.random.key(0)))
    return build(config, params).with_loss(NEXT_TOKEN)


def texts(vocabulary: int) -> Any:
    """Eight random texts of 128 tokens."""
    import jax
    import jax.numpy as jnp

    import tvjax as tv

    tokens = jax.random.randint(jax.random.key(1), (8, 128), 0, vocabulary)
    following, mask = jnp.roll(tokens, -1, 1), jnp.ones(tokens.shape, bool).at[:, -1].set(False)
    return tv.Batch({"tokens": tokens, "wanted": following}, {"tokens": following, "mask": mask})


def theseus(blocks: int, width: int) -> dict[str, Any]:
    """A task vector moved stage by stage; towers of two blocks compile what is compiled."""
    import jax
    import jax.numpy as jnp

    import tvjax as tv

    link = tv.theseus(method="randomised", rank=0.25)

    def once(depth: int) -> float:
        source, target = llama(0, depth, width), llama(1, depth, width)
        tau = jax.tree.map(lambda x: (x * 0.01).astype(jnp.bfloat16), source.params)
        batch = texts(source.params["embeddings"]["tokens"].shape[0])
        jax.block_until_ready((source.params, target.params, tau))
        started, moved = time.perf_counter(), []

        def write(number: int, path: str, leaf: Any) -> None:
            moved.append((path, jax.block_until_ready(leaf).shape))

        tv.fit(link, source, target, [batch], stream=[tau], write=write)
        assert len(moved) == len(jax.tree.leaves(target.params))
        return time.perf_counter() - started

    cold, short = once(2), once(2)
    before = time.process_time()
    whole = once(blocks)
    return {
        "compile_seconds": cold - short,
        "run_seconds": whole,
        "processor_seconds": time.process_time() - before,  # of all threads, model making included
        "seconds_of_two_blocks": short,
    }


def gradfix(blocks: int, width: int) -> dict[str, Any]:
    """Votes of eight texts beside a plain pass of the same batch, each after it is compiled."""
    import jax
    import jax.numpy as jnp

    import tvjax as tv
    from tvjax.stages import local_params

    def plain_pass(model: Any, batch: Any) -> Any:
        def total(params: Any) -> Any:
            carry = batch.inputs
            for stage in model.stages:
                carry = jax.checkpoint(stage.function)(local_params(stage, params), carry)
            return jnp.sum(model.loss(model.loss_params, carry, batch.labels))

        return jax.jit(jax.grad(total))

    batch = texts(32000 if width == 2048 else 500)
    short = llama(0, 2, width)
    jax.block_until_ready(tv.fit(tv.gradfix(), short, short, [batch]))
    model = llama(0, blocks, width)
    started, before = time.perf_counter(), time.process_time()
    jax.block_until_ready(tv.fit(tv.gradfix(), model, model, [batch]))
    votes, processor = time.perf_counter() - started, time.process_time() - before
    peak = peak_memory_gib()
    gradient = plain_pass(model, batch).lower(model.params).compile()
    started, before = time.perf_counter(), time.process_time()
    jax.block_until_ready(gradient(model.params))
    plain, plain_processor = time.perf_counter() - started, time.process_time() - before
    return {
        "run_seconds": votes,
        "processor_seconds": processor,
        "plain_processor_seconds": plain_processor,
        "plain_forward_backward_seconds": plain,
        "ratio": votes / plain,
        "peak_memory_gib": peak,
    }


def peak_memory_gib() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def main() -> None:
    """Runs the cases in processes of their own and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], help="cases to run; all by default")
    parser.add_argument("--blocks", type=int, default=22)
    parser.add_argument("--width", type=int, default=2048, help="a smaller one shows that it runs, and writes nothing")
    parser.add_argument("--output", type=Path, default=Path("results/bench_language.json"))
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        measured = globals()[arguments.one](arguments.blocks, arguments.width)
        about = {"case": arguments.one, "blocks": arguments.blocks, "width": arguments.width}
        print(json.dumps({**about, "peak_memory_gib": peak_memory_gib(), **measured}))
        return
    known = {}
    if arguments.output.exists():
        known = {result["case"]: result for result in json.loads(arguments.output.read_text())["results"]}
    versions = {package: importlib.metadata.version(package) for package in ("jax", "jaxlib", "flax", "numpy")}
    processor = platform.processor() or platform.machine()
    machine = {"cores": os.cpu_count(), "processor": processor, "python": platform.python_version()}
    for name in arguments.cases or CASES:
        command = [sys.executable, __file__, "--one", name, "--blocks", str(arguments.blocks)]
        command += ["--width", str(arguments.width)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr}")
        known[name] = json.loads(done.stdout.splitlines()[-1])
        print(json.dumps(known[name]), flush=True)
        if arguments.width == 2048:
            report = {"versions": versions, "machine": machine, "results": list(known.values())}
            temporary = arguments.output.with_suffix(".tmp")
            temporary.write_text(json.dumps(report, indent=1) + "\n")
            temporary.replace(arguments.output)


if __name__ == "__main__":
    main()
