"""Random numbers that depend on only a key and a position, and first weights."""
