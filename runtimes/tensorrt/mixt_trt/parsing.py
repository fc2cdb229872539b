"""Read an ONNX file into a TensorRT network, and say what TensorRT cannot take, node by node."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .errors import NotSupportedError
from .log import Log

_REEXPORT = "export with --target trt and the --jetpack of this board (6: TensorRT 10.3, 7: TensorRT 10.15 and later)"

#: What the parser says -> what to do about it; the first match counts.
_REMEDIES = (
    (re.compile(r"only supports Attention nodes with one output"), f"the graph is of another dialect: {_REEXPORT}"),
    (
        re.compile(r"No importer registered|Plugin not found|failed to load \w+ plugin|creator && |UNSUPPORTED_NODE"),
        f"this TensorRT has no such operator: {_REEXPORT}, or register the plugin before building",
    ),
    (
        re.compile(r"(?i)same (input |data )?type|types? (must|mismatch|are not)|mismatch\w* (data )?type"),
        "the graph mixes types and the network is strongly typed: export again, the exporter puts the casts in",
    ),
    (re.compile(r"(?i)opset"), f"this TensorRT reads older opsets only: {_REEXPORT}"),
    (re.compile(r"(?i)(failed to|cannot|could not) open|No such file|external"), "copy the whole exported folder"),
)  # fmt: skip


def parse(module: Any, network: Any, logger: Any, log: Log, graph: Path) -> Any:
    """Parse ``graph`` (with its external data) into ``network``; returns the parser, to be kept until the build ended.

    Raises NotSupportedError with every error's node, operator and remedy, and for inputs or attributes it left out.
    """
    parser = module.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)) or parser.num_errors:
        errors = [_describe(parser.get_error(index)) for index in range(parser.num_errors)]
        raise NotSupportedError(f"{graph}: {'; '.join(errors) or _last(log)}.")
    check_traps(log, graph)
    return parser


def check_traps(log: Log, graph: Path) -> None:
    """Raise NotSupportedError when TensorRT said that it left something of the graph out: results would be wrong."""
    traps = log.traps()
    if traps:
        raise NotSupportedError(
            f"{graph}: TensorRT leaves part of the graph out ({'; '.join(traps)}), so its results would be wrong; "
            f"{_REEXPORT}."
        )


def mark_layer_outputs(network: Any, names: list[str]) -> None:
    """Make the tensors ``names`` outputs of ``network``. Raises NotSupportedError for one that is not there."""
    wanted = set(names)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        for position in range(layer.num_outputs):
            tensor = layer.get_output(position)
            if tensor is not None and tensor.name in wanted:
                wanted.discard(tensor.name)
                network.mark_output(tensor)
    if wanted:
        raise NotSupportedError(f"the parsed network has no tensor {sorted(wanted)[0]!r}; build without layer outputs.")


def _describe(error: Any) -> str:
    text = " ".join(str(error.desc()).split()).rstrip(".")
    remedy = next((advice for pattern, advice in _REMEDIES if pattern.search(text)), f"{_REEXPORT}, or report it")
    where = f"node {error.node()} {error.node_name()!r} ({error.node_operator()})"
    stack = error.local_function_stack() if error.local_function_stack_size() else []
    inside = f" inside {' > '.join(map(str, stack))}" if stack else ""
    return f"{where}{inside}: {text} - {remedy}"


def _last(log: Log) -> str:
    return " ".join(log.errors[-1].split()) if log.errors else "TensorRT cannot parse it and does not say why"
