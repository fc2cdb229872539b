"""The same model in other engines and in ours: speed, size, memory, quality (python -m benchmarks.peers)."""
