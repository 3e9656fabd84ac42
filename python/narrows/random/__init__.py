"""Random numbers that depend on a key and a position alone, and the first weights drawn from them."""
