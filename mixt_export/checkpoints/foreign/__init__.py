"""Formats of other tools, one file each; every one of them becomes an ordinary Checkpoint (docs/foreign.md)."""

from __future__ import annotations

from mixt_export.checkpoints.foreign import (
    aa_svd,
    ablinear,
    asvd,
    basis_sharing,
    blast,
    dobi_svd,
    peft,
    pickled,
    svd_llm,
    tt_llm,
    unlabelled,
)

#: Asked in this order: those that a file's name or config.json gives away, then those told by names of tensors.
FORMATS = (peft, ablinear, asvd, dobi_svd, svd_llm, blast, basis_sharing, aa_svd, pickled, tt_llm, unlabelled)
