"""Real pre-trained weights and data that public packages ship, for `scripts/real_models.py`."""
