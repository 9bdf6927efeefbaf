"""What carries a skill into a new base model: the methods, and the columns of their table (../compare_carry.py)."""
