"""Operations, one folder each: `reference.py` defines, every kernel beside it equals it."""
