"""Command line: parsing and printing, no logic."""
