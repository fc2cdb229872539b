"""Nodes that a compiled kernel executes as a whole where TensorRT has it, and their function's body anywhere else.

Which linears a kernel serves is known to runtimes/tensorrt/mixt_trt/tactics.py, the module that launches them. A node
says with attributes that a plugin of the namespace ``mixt`` may take its place; functions declare these attributes and
do not use them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir

from mixt_export.lower.builder import MIXT_DOMAIN
from mixt_export.lower.functions import function_text
from mixt_export.lower.mixture import mixt_node
from mixt_export.network import Branch, Core, FactorizedLinear
from mixt_export.plan import MixtForm
from mixt_export.plan.merged import Merged
from mixt_export.runtime import toolkit

#: TensorRT's parser looks for a plugin of this namespace and version, and takes its ahead-of-time implementation.
PLUGIN_ATTRIBUTES: dict[str, Any] = {"plugin_namespace": MIXT_DOMAIN, "plugin_version": "1", "aot": 1}
#: Sizes of a MixT for its kernel, which no shape tells: in, out, then left, rows, columns, right of each window.
WINDOWS = "windows"

Array = np.ndarray[Any, Any]
Load = Callable[[str], Array]


@dataclass(frozen=True)
class FusedTensor:
    """A core as the kernels read it: (r_(k-1), out_k, in_k, r_k), made from the stored tensors ``sources``.

    ``stored``: it is the tensor ``name``, its elements in their stored order.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    make: Callable[[Load], Array]
    stored: bool


@dataclass(frozen=True)
class FusedNode:
    """Operator, attributes and weights of a node; a MixT's weights are those of its form, and not repeated here."""

    op_type: str
    attributes: dict[str, Any]
    tensors: tuple[FusedTensor, ...] = ()


def fused_node(
    form: MixtForm | Merged | FactorizedLinear, dtype: str, *, largest_waste: float | None = None
) -> FusedNode | None:
    """The node for ``form`` at the graph's ``dtype``, None where no kernel serves it.

    A MixT in windows is the operator that it is anyway, with attributes for the plugin. A linear whose cores, merged or
    not, are a tensor train of two sites becomes TTLinear2. ``largest_waste``: see tactics.LARGEST_WASTE.
    """
    if isinstance(form, MixtForm):
        return _mixture(form, dtype)
    merged = form if isinstance(form, Merged) else Merged(form, {})
    sites = _sites(merged.network)
    if sites is None:
        return None
    tactics = toolkit("tactics")
    linear = tactics.Train(
        tuple(site.inside for site in sites), tuple(site.outside for site in sites),
        tuple(site.after for site in sites[:-1]), dtype, merged.network.bias is not None,
    )  # fmt: skip
    if linear.refusal(largest_waste) is not None:
        return None
    scale = merged.network.branches[0].scale
    tensors = tuple(_tensor(merged, site, scale if site is sites[-1] else 1.0) for site in sites)
    name = f"TTLinear{len(sites)}{'Bias' if linear.bias else ''}"
    return FusedNode(name, _views(linear) | PLUGIN_ATTRIBUTES, tensors)


def fused_function(op_type: str) -> ir.Function:
    """The function ``op_type``, which declares the attributes of a node that a plugin may replace."""
    proto = onnx.parser.parse_function(function_text(op_type))
    wanted = [*PLUGIN_ATTRIBUTES, *([WINDOWS] if op_type.startswith("MixT") else [])]
    proto.attribute.extend(name for name in wanted if name not in proto.attribute)
    return ir.serde.deserialize_function(proto)


def _mixture(form: MixtForm, dtype: str) -> FusedNode | None:
    op_type, attributes = mixt_node(form)
    windows = [(window.left, window.rows, window.columns, window.right) for window in form.windows]
    tactics = toolkit("tactics")
    linear = tactics.Mixture(
        form.in_features, form.out_features, tuple(tactics.Window(*window) for window in windows),
        form.layout == "left", dtype, form.bias,
    )  # fmt: skip
    if linear.refusal() is not None:
        return None
    sizes = [form.in_features, form.out_features, *(size for window in windows for size in window)]
    return FusedNode(op_type, {**attributes, WINDOWS: sizes, **PLUGIN_ATTRIBUTES})


def _views(linear: Any) -> dict[str, list[int]]:
    """Shapes of the function's Reshapes; batch (0) and sequence (-1) stay open."""
    inside, outside = linear.in_modes, linear.out_modes
    ranks, last = (1, *linear.ranks, 1), len(linear.in_modes)
    found = {
        f"matrix{site}": [ranks[site - 1] * outside[site - 1], inside[site - 1] * ranks[site]]
        for site in range(1, last + 1)
    }
    found["rows"] = [0, -1, inside[-1]]
    for site in range(1, last):
        found[f"view{site}"] = [0, -1, inside[site - 1] * ranks[site], prod(outside[site:])]
    return found | {"join": [0, -1, prod(outside)]}


@dataclass(frozen=True)
class _Site:
    """One core of a chain: its sizes, and its axes in the order (bond before, out modes, in modes, bond after)."""

    core: Core
    before: int
    outside: int
    inside: int
    after: int
    perm: tuple[int, ...]


def _sites(network: FactorizedLinear) -> list[_Site] | None:
    """The cores of ``network`` along the chain, None where it is anything but a tensor train of two."""
    if len(network.branches) != 1 or network.sparse is not None:
        return None
    (branch,) = network.branches
    if branch.padded or len(branch.cores) != toolkit("tactics").CORES:
        return None
    order = _order(branch)
    if order is None:
        return None
    cores = [branch.cores[index] for index in order]
    found = [_site(branch, cores, position) for position in range(len(cores))]
    return None if any(site is None for site in found) else [site for site in found if site is not None]


def _order(branch: Branch) -> list[int] | None:
    """Cores in the order in which the input modes and, alike, the output modes meet them; each has one of both."""
    orders = []
    for modes in (branch.in_modes, branch.out_modes):
        owners = [[index for index, core in enumerate(branch.cores) if label in core.labels] for label, _ in modes]
        if any(len(owner) != 1 for owner in owners):
            return None
        flat = [owner[0] for owner in owners]
        orders.append([core for position, core in enumerate(flat) if position == 0 or flat[position - 1] != core])
    inputs, outputs = orders
    return inputs if inputs == outputs and sorted(inputs) == list(range(len(branch.cores))) else None


def _site(branch: Branch, cores: Sequence[Core], position: int) -> _Site | None:
    core = cores[position]
    sizes, labels = dict(core.modes()), set(core.labels)
    modes = [[label for label, _ in ends if label in labels] for ends in (branch.out_modes, branch.in_modes)]
    before = _shared(cores[position - 1], core) if position else []
    after = _shared(core, cores[position + 1]) if position + 1 < len(cores) else []
    bonds = labels - {label for end in modes for label in end} - set(before) - set(after)
    if set(before) & set(after) or any(sizes[label] != 1 for label in bonds):
        return None
    axes = [*sorted(bonds), *before, *modes[0], *modes[1], *after]
    outside, inside = (prod(sizes[label] for label in group) for group in modes)
    first, last = (prod(sizes[label] for label in bond) for bond in (before, after))
    perm = tuple(core.labels.index(label) for label in axes)
    return _Site(core, first, outside, inside, last, perm)


def _shared(left: Core, right: Core) -> list[str]:
    """Bonds between two neighbours, in one order for both."""
    return [label for label in left.labels if label in right.labels]


def _tensor(merged: Merged, site: _Site, scale: float) -> FusedTensor:
    stored, shape = site.core.tensor, (site.before, site.outside, site.inside, site.after)
    source = merged.sources.get(stored.name)
    lengths = [length for length in (stored.shape[axis] for axis in site.perm) if length > 1]
    kept = [axis for axis in site.perm if stored.shape[axis] > 1]
    in_place = source is None and scale == 1.0 and kept == sorted(kept)

    def make(load: Load) -> Array:
        values = load(stored.name).astype(np.float64) if source is None else source.make(load)
        return scale * values.transpose(site.perm).reshape(shape)

    assert prod(lengths) == prod(shape)
    sources = (stored.name,) if source is None else tuple(part.tensor.name for part in source.parts)
    return FusedTensor(stored.name if in_place else f"{stored.name}.fused", shape, sources, make, in_place)
