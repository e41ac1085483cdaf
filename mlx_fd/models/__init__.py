"""Names to models: aliases, resolving, reading GGUF, pruning, pairing checks, loading, memory."""
