"""Thousands of mutated files are tried only where they are asked for: ``pytest -m fuzz``."""


def pytest_collection_modifyitems(config, items):
    if "fuzz" in config.option.markexpr:
        return
    heavy = [item for item in items if item.get_closest_marker("fuzz")]
    items[:] = [item for item in items if not item.get_closest_marker("fuzz")]
    config.hook.pytest_deselected(items=heavy)
