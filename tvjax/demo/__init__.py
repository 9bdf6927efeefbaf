"""The experiment of ``tvjax demo``: task vectors of the embedded models, combined and moved into other models."""
