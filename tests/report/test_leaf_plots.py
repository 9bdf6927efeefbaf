import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from tvjax.compose import init
from tvjax.report.leaf_plots import plot_coefficients


def test_the_heat_map_shows_the_values(tmp_path):
    layer = {"up": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    tau = {"blocks": {str(i): layer for i in range(3)}, "head": jnp.ones((2, 2)), "temperature": jnp.ones(())}
    part = {"blocks": {"1": layer}}
    images = []
    for options in ({}, {"partitions": 2, "key": jax.random.key(0)}, {"matrices_only": True}):
        coefficients = init([tau, part], names=["thick", "upside_down"], **options)
        values = jax.random.normal(jax.random.key(1), coefficients.values.shape)
        for filled in (coefficients, dataclasses.replace(coefficients, values=values)):
            plot_coefficients(filled, tmp_path / "heat.png")
            with Image.open(tmp_path / "heat.png") as image:
                assert image.format == "PNG" and min(image.size) > 200
                images.append(np.asarray(image.convert("RGB"), np.float32))
        colourful = [np.ptp(pixels, axis=-1).mean() for pixels in images[-2:]]
        assert colourful[1] > 1.3 * colourful[0]
    assert [path.name for path in tmp_path.iterdir()] == ["heat.png"]
