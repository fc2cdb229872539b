"""Tests of mixt_export."""
