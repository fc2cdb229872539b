"""Tests of reading what other tools write, against modules written from the formats' descriptions."""
