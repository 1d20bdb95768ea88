"""Operations, one folder each: `reference.py` is the definition, every kernel beside it equals it."""
