"""What to cite is known of everything that a recipe can name."""

import pytest

import tvjax as tv
from tvjax.citations import papers_behind
from tvjax.jobs.configs import MERGES, TRANSPORTS, ComposeConfig


@pytest.mark.parametrize("name", (*TRANSPORTS, *MERGES))
def test_every_method_has_an_entry(name):
    text = tv.cite(name)
    assert text.startswith("@misc{tvjax,") and all(key in text for key in papers_behind(name))


def test_a_chain_cites_its_links_once_each():
    by_name, itself = tv.cite("bico+gradfix"), tv.cite(tv.chain(tv.bico(), tv.gradfix(), tv.scale_by(0.5)))
    assert by_name == itself and by_name.count("@misc{") == 3
    assert tv.cite("iso_c", "iso_cts").count("@misc{") == 2


def test_every_objective_has_an_entry():
    for name in ComposeConfig.model_json_schema()["properties"]["objective"].get("enum", ()):
        assert papers_behind(name)


def test_an_unknown_name_says_which_there_are():
    with pytest.raises(ValueError, match="no citation is known of 'bicco': choose among .*bico"):
        tv.cite("bicco")
