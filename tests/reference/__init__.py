"""Tests of mixt_export.reference."""
