"""Tests of mixt_export.compression."""
