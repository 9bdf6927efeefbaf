"""The script that records the goldens needs torch, and is no test."""

collect_ignore = ["record_goldens.py"]
