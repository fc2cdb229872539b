"""Faults put into exported folders: each kind is one function that edits graph, weights or companion files."""
