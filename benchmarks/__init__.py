"""Benchmarks: each module is one question, prints its answer as JSON and keeps it in benchmarks/results/."""
