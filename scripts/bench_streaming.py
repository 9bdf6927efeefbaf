"""Memory and time of models that stay on disk: two random Llamas of the shape of TinyLlama 1.1B, 2.2 GB in bfloat16.

The models lie in a temporary folder, in files of half a gigabyte. Each case runs in a process of its own; its memory is
the peak of the resident set, less what the runtime had after the same command on models of two narrow blocks.

- ``stream``: ``tvjax transport --stream`` by Theseus at a quarter of the rank, with 8 texts of 128 tokens, at half the
  depth and at the whole one; beside it what ``tvjax plan --stream`` says beforehand.
- ``arithmetic``: ``tvjax extract``, ``apply``, ``convert`` and ``merge`` (task arithmetic of two task vectors), beside
  plain copies of the files that each of them reads, in turns. ``share_of_copy_rate`` compares bytes that are read and
  written in a second; either way they are synced to the disk, and stay in the page cache. What is read lies in the page
  cache, or (``from the disk``) was dropped from it before. ``fixed_seconds`` is a command on a model of two narrow
  blocks, most of it imports.
- ``plan``: ``tvjax plan --stream`` of two models of 7B parameters whose weights are holes in their files.

    python scripts/bench_streaming.py                             # all; minutes on two cores, 10 GB on the disk
    python scripts/bench_streaming.py stream --width 512          # narrow models show that it runs, and write nothing
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CASES = ("stream", "arithmetic", "plan")
SHARD = "500MB"
BLOCK = 2**24
TEXTS, TOKENS = 8, 128
REPEATS = 3


def config_of(blocks: int, width: int) -> Any:
    """The shape of TinyLlama 1.1B with so many blocks at width 2048, of Llama 7B at 4096; narrow ones for a try."""
    from tvjax.models.llama import LlamaConfig

    heads, shared = (32, 32) if width == 4096 else (width // 64, width // 512 or 1)
    hidden = 11008 if width == 4096 else 11 * width // 4
    words = 32000 if width >= 2048 else 500
    return LlamaConfig(words, width, hidden, blocks, heads, shared, width // heads, max_position_embeddings=2048)


def make_model(folder: Path, blocks: int, width: int, seed: int, change: int | None = None) -> None:
    """A random model; with a change its weights are those of the seed and a little of those of the change."""
    import jax
    import ml_dtypes
    import numpy as np

    from tvjax.checkpoints import Pretrained, save_pretrained
    from tvjax.models.llama import init, llama

    config = config_of(blocks, width)
    random = [np.random.default_rng(one) for one in ((seed,) if change is None else (seed, change))]

    def leaf(like: Any) -> Any:
        made = [one.standard_normal(like.shape, np.float32) for one in random]
        if len(like.shape) < 2:
            return np.ones(like.shape, ml_dtypes.bfloat16)
        total = made[0] if change is None else made[0] + 0.1 * made[1]
        return (total * np.float32(like.shape[0] ** -0.5)).astype(ml_dtypes.bfloat16)

    params = jax.tree.map(leaf, jax.eval_shape(lambda key: init(config, key), jax.random.key(0)))
    save_pretrained(Pretrained(llama(config, params), config), folder, max_shard_size=SHARD)
    write_tokenizer(folder, config.vocab_size)


def make_header(folder: Path, blocks: int, width: int) -> None:
    """A model whose weights are a hole in its file: only its header can be read."""
    import numpy as np

    from tvjax import tree
    from tvjax.models.families import LLAMA, shapes_of
    from tvjax.models.key_table import to_checkpoint

    config = config_of(blocks, width)
    shapes = shapes_of(config)
    params = tree.nest({path: np.broadcast_to(np.int8(0), shape) for path, shape in shapes.items()})
    header, end = {}, 0
    for key, tensor in to_checkpoint(LLAMA.table, params).items():
        start, end = end, end + 2 * tensor.size
        header[key] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    folder.mkdir(parents=True)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(file.tell() + end)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    write_tokenizer(folder, config.vocab_size)


def write_tokenizer(folder: Path, words: int) -> None:
    """A tokenizer whose words are numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_texts(file: Path, words: int) -> None:
    """Random texts."""
    import numpy as np

    numbers = np.random.default_rng(1).integers(0, words, (TEXTS, TOKENS))
    file.write_text("".join(json.dumps({"text": " ".join(f"w{n}" for n in row)}) + "\n" for row in numbers))


def names(folder: Path, blocks: int, width: int) -> dict[str, str]:
    """The folders of the models of a shape, which are made where they are not there."""
    found = {}
    for name, seeds in (("source", (0,)), ("finetuned", (0, 2)), ("target", (1,))):
        found[name] = folder / f"{name}-{blocks}-{width}"
        if not found[name].is_dir():
            make_model(found[name], blocks, width, *seeds)
    return {name: str(path) for name, path in found.items()}


def options(folder: Path, blocks: int, width: int) -> dict[str, Any]:
    """What a transport and its plan are given."""
    texts = folder / f"texts-{width}.jsonl"
    if not texts.is_file():
        write_texts(texts, config_of(1, width).vocab_size)
    chosen = {"method": "randomised", "rank": 0.25}
    return {
        "method": "theseus",
        "options": chosen,
        "data": str(texts),
        "batch_size": TEXTS,
        "length": TOKENS,
        "stream": True,
    }


def planned(folder: Path, blocks: int, width: int, models: dict[str, str]) -> dict[str, Any]:
    """What the plan says, and how long that takes once everything is imported."""
    from tvjax import jobs
    from tvjax.jobs.configs import PlanConfig

    jobs.plan(PlanConfig(**names(folder, 2, 128), **options(folder, 2, 128)))
    started, before = time.perf_counter(), time.process_time()
    found = jobs.plan(PlanConfig(**models, **options(folder, blocks, width)))
    seconds = {"seconds": time.perf_counter() - started, "processor_seconds": time.process_time() - before}
    return {**seconds, "memory": found.memory, "fit": found.fit}


def stream(folder: Path, blocks: int, width: int) -> dict[str, Any]:
    """The transport of a depth."""
    import shutil

    from tvjax import jobs
    from tvjax.jobs.configs import TransportConfig

    def run(blocks: int, width: int) -> float:
        output = folder / f"edited-{blocks}-{width}"
        models = names(folder, blocks, width)
        started = time.perf_counter()
        jobs.transport(TransportConfig(**models, **options(folder, blocks, width), output=output))
        shutil.rmtree(output)
        return time.perf_counter() - started

    run(2, 128)
    own = peak()
    before = time.process_time()
    seconds = run(blocks, width)
    return {
        "run_seconds": seconds,
        "processor_seconds": time.process_time() - before,
        "runtime_bytes": own,
        "process_peak_bytes": peak(),
        "peak_bytes": peak() - own,
        "weights_bytes": sum(
            file.stat().st_size for file in Path(names(folder, blocks, width)["target"]).glob("*.safetensors")
        ),
    }


def plan_of(folder: Path, blocks: int, width: int) -> dict[str, Any]:
    """The plan of the models that are there."""
    return planned(folder, blocks, width, names(folder, blocks, width))


def plan_7b(folder: Path, blocks: int, width: int) -> dict[str, Any]:
    """The plan of two models of 7B parameters."""
    models = {name: folder / f"{name}-7b" for name in ("source", "target")}
    for path in models.values():
        if not path.is_dir():
            make_header(path, 32, 4096)
    return planned(folder, 32, 4096, {name: str(path) for name, path in models.items()})


def arithmetic(folder: Path, blocks: int, width: int) -> dict[str, Any]:
    """The arithmetic of files and copies of what it reads, in turns, each of them a few times."""
    from tvjax import jobs
    from tvjax.jobs.configs import ApplyConfig, ConvertConfig, ExtractConfig, MergeConfig

    models, small = names(folder, blocks, width), names(folder, 2, 128)
    tau, merged, edited = (folder / name for name in ("tau.safetensors", "merged.safetensors", "edited"))

    def extract(models: dict[str, str]) -> None:
        about: dict[str, Any] = {"pretrained": models["source"], "finetuned": models["finetuned"]}
        jobs.extract(ExtractConfig(**about, output=tau, dtype="bfloat16"))

    def apply() -> None:
        jobs.apply(ApplyConfig(task_vectors=(tau,), model=models["source"], output=edited))

    def convert() -> None:
        jobs.convert(ConvertConfig(source=models["source"], output=edited))

    def merge() -> None:
        given: dict[str, Any] = {"task_vectors": (tau, tau), "method": "task_arithmetic"}
        jobs.merge(MergeConfig(**given, output=merged, dtype="bfloat16"))

    extract(small)
    own = peak()
    extract(models)
    base, tuned = (sorted(Path(models[name]).glob("*.safetensors")) for name in ("source", "finetuned"))
    cases: tuple[tuple[str, Callable[[], None], list[Path], Path], ...] = (
        ("extract", lambda: extract(models), [*base, *tuned], tau),
        ("apply", apply, [*base, tau], edited),
        ("convert", convert, base, edited),
        ("merge", merge, [tau, tau], merged),
    )
    found: dict[str, Any] = {"fixed_seconds": fixed(small, tau.with_stem("small"))}
    for title, run, read, written in cases:
        for place in ("page cache", "disk") if title in ("extract", "apply") else ("page cache",):
            measured = in_turns(run, read, written, place == "disk")
            found[f"{title}, from the {place}"] = {**measured, "peak_bytes_so_far": peak() - own}
    return found


def in_turns(run: Callable[[], None], read: list[Path], written: Path, from_disk: bool) -> dict[str, Any]:
    """A job and a copy of the files that it reads, in turns; the medians are compared."""
    ours, plain, bytes_read = [], [], sum(file.stat().st_size for file in read)
    for _ in range(REPEATS):
        remove(written)
        for seconds, work in ((ours, run), (plain, lambda: copy(read, written.with_name("copies")))):
            for file in read:
                settle(file, from_disk)
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
            remove(written.with_name("copies"))
    files = written.glob("*.safetensors") if written.is_dir() else [written]
    moved = bytes_read + sum(file.stat().st_size for file in files)
    rates = moved / statistics.median(ours), 2 * bytes_read / statistics.median(plain)
    sizes = {"moved_bytes": moved, "copy_moved_bytes": 2 * bytes_read}
    return {"seconds": ours, "copy_seconds": plain, **sizes, "share_of_copy_rate": rates[0] / rates[1]}


def copy(files: list[Path], folder: Path) -> None:
    """Plain copies, synced one after another."""
    folder.mkdir()
    for number, file in enumerate(files):
        with open(file, "rb", buffering=0) as source, open(folder / str(number), "wb", buffering=0) as target:
            while block := source.read(BLOCK):
                target.write(block)
            os.fsync(target.fileno())


def settle(file: Path, drop: bool) -> None:
    """Waits until a file is on the disk, and drops it from the page cache or reads it into it."""
    with open(file, "rb", buffering=0) as opened:
        os.fsync(opened.fileno())
        if drop:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while not drop and opened.read(BLOCK):
            pass


def remove(path: Path) -> None:
    """Removes a file or a folder that a run wrote, where there is one."""
    import shutil

    if path.is_dir():
        shutil.rmtree(path)
    elif path.name != "tau.safetensors":  # which is read again
        path.unlink(missing_ok=True)


def fixed(models: dict[str, str], output: Path) -> float:
    """Seconds of a command that has next to nothing to do."""
    words = ["extract", "--pretrained", models["source"], "--finetuned", models["finetuned"], "--output", str(output)]
    script = f"from tvjax.cli.main import run; raise SystemExit(run({words!r}))"
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    return time.perf_counter() - started


def peak() -> int:
    """Peak resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


STEPS: dict[str, Callable[[Path, int, int], dict[str, Any]]] = {
    "make": lambda folder, blocks, width: names(folder, blocks, width),
    "stream": stream,
    "plan": plan_of,
    "plan_7b": plan_7b,
    "arithmetic": arithmetic,
}


def alone(step: str, folder: Path, blocks: int, width: int) -> dict[str, Any]:
    """A step in a process of its own."""
    command = [sys.executable, __file__, "--one", step, "--folder", str(folder)]
    command += ["--blocks", str(blocks), "--width", str(width)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{step} failed:\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(case: str, folder: Path, blocks: int, width: int) -> dict[str, Any]:
    """A case, its steps one after another."""
    alone("make", folder, 2, 128)
    if case == "plan":
        return {"7B": alone("plan_7b", folder, blocks, width)}
    alone("make", folder, blocks, width)
    if case == "arithmetic":
        return alone("arithmetic", folder, blocks, width)
    found = {}
    for depth in (blocks // 2, blocks):
        alone("make", folder, depth, width)
        ours, said = alone("stream", folder, depth, width), alone("plan", folder, depth, width)
        ratio = said["memory"]["streaming"] / ours["peak_bytes"]
        found[f"{depth} blocks"] = {**ours, "planned": said, "planned_by_measured": ratio}
        print(json.dumps({f"{depth} blocks": found[f"{depth} blocks"]}), flush=True)
    return found


def main() -> None:
    """Runs the cases and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], help="cases to run; all by default")
    parser.add_argument("--blocks", type=int, default=22)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--folder", type=Path, help="keep the models here, for a further run; default: a temporary one")
    parser.add_argument("--output", type=Path, default=Path("results/bench_streaming.json"))
    parser.add_argument("--one", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(STEPS[arguments.one](arguments.folder, arguments.blocks, arguments.width)))
        return
    known = json.loads(arguments.output.read_text())["results"] if arguments.output.exists() else {}
    versions = {package: importlib.metadata.version(package) for package in ("jax", "jaxlib", "numpy")}
    processor = platform.processor() or platform.machine()
    machine: dict[str, Any] = {"cores": os.cpu_count(), "processor": processor, "python": platform.python_version()}
    machine["load_average_before"] = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        for case in arguments.cases or CASES:
            known[case] = measure(case, folder, arguments.blocks, arguments.width)
            print(json.dumps({case: known[case]}), flush=True)
            if arguments.width == 2048:
                report = {"versions": versions, "machine": machine, "results": known}
                replaced = arguments.output.with_suffix(".tmp")
                replaced.write_text(json.dumps(report, indent=1) + "\n")
                replaced.replace(arguments.output)


if __name__ == "__main__":
    main()
