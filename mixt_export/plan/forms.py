"""Executable forms of a factorised linear of any structure."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from mixt_export.network import Branch, Core, FactorizedLinear, SparseResidual, TensorRef
from mixt_export.plan.mixture import Mixture
from mixt_export.plan.networks import NetworkForm, network_forms
from mixt_export.plan.pivot import pivot_form
from mixt_export.plan.windows import MixtForm, mixture_forms

Form = MixtForm | NetworkForm
"""What all have: name, in_features, out_features, elements, macs, operations, transposes, nodes, bias, dense."""


def forms_of(linear: FactorizedLinear) -> tuple[Form, ...]:
    """Every executable form of ``linear``: that of the stored cores first, the dense matrix last.

    Names: ``branches``, ``pairs``, ``merged:1+3``, … for a MixT (see `windows`), else ``chain`` (cores in their own
    order), ``chain:reversed``, ``order:2,1,3``, ``merged:1-2,3`` (cores 1 and 2 merged; groups in the order in which
    they meet the activation), with ``/`` between branches that differ; ``dense``. Linears of one structure share their
    forms. Raises NetworkError as ``network.best_order``.
    """
    mixture = Mixture.of(linear)
    if mixture is not None:
        return mixture_forms(replace(mixture, name=""), bias=linear.bias is not None)
    return _of_structure(structure(linear))


def named_forms(linear: FactorizedLinear) -> tuple[Form, ...]:
    """`forms_of` and, before the matrix, what is executed only where it is asked for by name: ``pivot`` (see pivot)."""
    *forms, dense = forms_of(linear)
    asked = pivot_form(linear)
    return (*forms, dense) if asked is None else (*forms, asked, dense)


def structure(linear: FactorizedLinear) -> FactorizedLinear:
    """``linear`` with the names of labels and tensors, the method and the dtypes gone: equal for equal structures."""
    tensors: dict[str, str] = {}

    def neutral(tensor: TensorRef) -> TensorRef:
        return TensorRef(tensors.setdefault(tensor.name, f"t{len(tensors)}"), tensor.shape, "float32")

    branches = []
    for branch in linear.branches:
        label = {name: f"l{index}" for index, name in enumerate(branch.sizes())}
        cores = tuple(Core(neutral(core.tensor), tuple(label[name] for name in core.labels)) for core in branch.cores)
        inputs = tuple((label[name], size) for name, size in branch.in_modes)
        outputs = tuple((label[name], size) for name, size in branch.out_modes)
        branches.append(Branch(inputs, outputs, cores, branch.scale, branch.padded))
    bias = None if linear.bias is None else TensorRef("linear.bias", linear.bias.shape, "float32")
    sparse = None
    if linear.sparse is not None:
        shape = linear.sparse.values.shape
        sparse = SparseResidual(
            TensorRef("rows", shape, "int64"), TensorRef("cols", shape, "int64"), TensorRef("values", shape, "float32")
        )
    return FactorizedLinear("linear", linear.in_features, linear.out_features, tuple(branches), bias, "", sparse)


@lru_cache(maxsize=4096)
def _of_structure(linear: FactorizedLinear) -> tuple[NetworkForm, ...]:
    return network_forms(linear)
