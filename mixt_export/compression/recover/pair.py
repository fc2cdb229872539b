"""Teacher and student side by side: the student must be the teacher with some linears factorised."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from mixt_export.checkpoints import Checkpoint
from mixt_export.checkpoints.layout import layer_of
from mixt_export.compression.blocks import BlockwiseModel
from mixt_export.compression.texts import open_tokenizer
from mixt_export.errors import CheckpointError, UsageError

#: How names of the final norm's tensors end.
_FINAL_NORM = ("norm.weight", "norm.bias", "ln_f.weight", "ln_f.bias")

#: Keys of config.json that do not change what a model computes.
_INDIFFERENT = {"torch_dtype", "dtype", "transformers_version", "_name_or_path", "use_cache", "architectures"}


@dataclass(frozen=True)
class Pair:
    """``blocks``: indices of the blocks with factorised linears, ascending; ``linears``: their names.

    ``dense``: parameters of the linears of these blocks that are not factorised.
    """

    student: Checkpoint
    teacher: Checkpoint
    blocks: tuple[int, ...]
    linears: tuple[str, ...]
    dense: int

    @property
    def kept(self) -> float:
        """Parameters of the linears of ``blocks`` over those that they have in the teacher."""
        factors = [self.student.factors[name] for name in self.linears]
        before = sum(linear.in_features * linear.out_features for linear in factors)
        return (self.dense + sum(linear.params for linear in factors)) / (self.dense + before)

    def may_move(self, name: str) -> bool:
        """Whether tensor ``name`` is a vector of a block in ``blocks`` or behind the last block (the final norm)."""
        ref = self.student.store[name].ref
        index = block_of(name)
        return len(ref.shape) == 1 and (index in self.blocks if index is not None else name.endswith(_FINAL_NORM))


def block_of(name: str) -> int | None:
    """The block that a tensor or linear belongs to, by its path; None for embeddings, final norm and head."""
    return layer_of(name)


def check_pair(student: Checkpoint, teacher: Checkpoint, model: BlockwiseModel) -> Pair:
    """Compare the two folders, tensors included; ``model`` is the teacher's.

    Raises UsageError when the student has no factorised linear in a decoder block, the teacher has one, or the two do
    not match; CheckpointError when a tokenizer is missing.
    """
    if not student.factors:
        raise UsageError(f"{student.path}: no linear is factorised, so there is nothing to recover; compress it first.")
    if teacher.factors:
        raise UsageError(
            f"{teacher.path}: the teacher is factorised itself; give the dense model that {student.path} was made from."
        )
    known = set(model.linears())
    outside = sorted(set(student.factors) - known)
    if outside:
        raise UsageError(
            f"{student.path}: {outside[0]!r} is not a linear of a decoder block of the teacher; only those can be "
            "recovered."
        )
    _compare_configs(student, teacher)
    _compare_tokenizers(student, teacher)
    linears = tuple(name for name in model.linears() if name in student.factors)
    blocks = sorted({index for index in map(block_of, linears) if index is not None})
    others = [name for name in model.linears() if name not in student.factors and block_of(name) in blocks]
    dense = sum(prod(model.linear_shape(name)) for name in others)
    pair = Pair(student, teacher, tuple(blocks), linears, dense)
    _compare_tensors(pair, model)
    return pair


def _compare_configs(student: Checkpoint, teacher: Checkpoint) -> None:
    ours, theirs = (
        {key: value for key, value in checkpoint.config.items() if key not in _INDIFFERENT}
        for checkpoint in (student, teacher)
    )
    for key in sorted(set(ours) | set(theirs)):
        if ours.get(key) != theirs.get(key):
            raise _mismatch(
                student, teacher, f"config.json has {key} {_short(ours, key)} against {_short(theirs, key)}"
            )


def _short(config: dict[str, Any], key: str) -> str:
    return repr(config[key])[:60] if key in config else "nothing"


def _compare_tokenizers(student: Checkpoint, teacher: Checkpoint) -> None:
    open_tokenizer(student.path)
    open_tokenizer(teacher.path)
    ours, theirs = (checkpoint.companion("tokenizer.json") for checkpoint in (student, teacher))
    if ours is None or theirs is None or ours.read_bytes() != theirs.read_bytes():
        raise _mismatch(student, teacher, "tokenizer.json differs")


def _compare_tensors(pair: Pair, model: BlockwiseModel) -> None:
    """Everything but factors and trainable vectors must be the same, bit for bit."""
    student, teacher = pair.student, pair.teacher
    factors = {ref.name for linear in student.factors.values() for ref in linear.tensors()}
    for name, stored in student.store.items():
        if name in factors:
            continue
        if name not in teacher.store:
            raise _mismatch(student, teacher, f"the teacher has no tensor {name!r}")
        original = teacher.store[name]
        if stored.ref.shape != original.ref.shape or stored.ref.dtype != original.ref.dtype:
            raise _mismatch(
                student,
                teacher,
                f"{name!r} is {stored.ref.dtype} {stored.ref.shape} against {original.ref.dtype} {original.ref.shape}",
            )
        if pair.may_move(name):
            continue
        if any(a != b for a, b in zip(student.store.chunks(name), teacher.store.chunks(name), strict=True)):
            raise _mismatch(student, teacher, f"the values of {name!r} differ")
    replaced = {f"{name}.weight" for name in student.factors}
    missing = [name for name in teacher.store if name not in student.store and name not in replaced]
    if missing:
        raise _mismatch(student, teacher, f"the student has no tensor {missing[0]!r}")
    for name, linear in student.factors.items():
        dense = f"{name}.weight" in teacher.store
        if not dense or model.linear_shape(name) != (linear.out_features, linear.in_features):
            raise CheckpointError(f"{teacher.path}: {name!r} is not the linear that {student.path} factorises.")


def _mismatch(student: Checkpoint, teacher: Checkpoint, what: str) -> UsageError:
    return UsageError(
        f"{student.path} was not made from {teacher.path}: {what}; give --teacher the dense model it was made from."
    )
