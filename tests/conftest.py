"""Eight CPU devices and strict dtype promotion for every test; set before JAX starts."""

import contextlib
import gc
import os
import platform
import time
import zlib
from importlib.metadata import version
from pathlib import Path

# Thousands of small programs are compiled here, and most of them run once: machine code is not optimised, and nothing
# is split over threads to be compiled. A busy machine may keep one device waiting for the others far longer than
# XLA's forty seconds.
FLAGS = (
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_force_host_platform_device_count=8 --xla_cpu_collective_timeout_seconds=600 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=600"
)
if version("jaxlib").startswith("0.10."):  # later ones know no other way, and an unknown flag ends the process
    FLAGS += " --xla_cpu_use_fusion_emitters=false"  # two thirds of the time of compiling a small program
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "16")  # threads of XLA: a meeting of eight devices needs eight, whatever the cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def programs_folder() -> Path:
    """Where compiled programs are kept: for every process of a run, and for the next run on such a processor."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    kind = next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
    cache = Path(os.environ.get("TVJAX_CACHE") or Path.home() / ".cache" / "tvjax")
    folder = cache / f"test-programs-{zlib.crc32(kind.encode()):08x}"
    folder.mkdir(parents=True, exist_ok=True)
    for entry in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another run drops it too
            if time.time() - entry.stat().st_mtime > FORGOTTEN:
                entry.unlink()
    return folder


# Reading a program back takes a tenth of the time of compiling it. Workers inherit the folder; to compile everything
# anew name an empty one.
FORGOTTEN = 14 * 24 * 3600  # seconds
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    with contextlib.suppress(PermissionError):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(programs_folder())
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from PIL import Image  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
# Many CPU devices on few cores: programs in flight at once can wait for each other's collectives for ever.
jax.config.update("jax_cpu_enable_async_dispatch", False)
gc.set_threshold(50_000, 20, 50)  # a traced program is many small objects that live on


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Thousands of compiled programs in one process run into the system's limit of memory maps, 65,530."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Three random images of each of two classes, in a folder."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name in ("cat", "polar_bear"):
        (folder / name).mkdir()
        for number in range(3):
            Image.fromarray(rng.integers(0, 256, (10, 12, 3), np.uint8)).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(autouse=True)
def nothing_of_silence(monkeypatch):
    """No line on what is going on: on a machine that is slow today it would stand between the lines of an error."""
    monkeypatch.setattr("tvjax.cli.progress.SILENCE", 1e6)


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    """Tables are as wide as where there is no terminal; pytest-xdist says that there is one of 80 columns."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def programs():
    """The names of the programs that a call compiles: ``programs(function, *args)``."""

    def names(function, *args, **kwargs):
        found = []

        def listen(event, _, fun_name="", **__):
            if event.endswith("backend_compile_duration"):
                found.append(fun_name.removeprefix("jit(").removesuffix(")"))

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            jax.block_until_ready(function(*args, **kwargs))
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
        return found

    return names
