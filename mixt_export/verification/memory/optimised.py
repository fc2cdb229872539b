"""What ONNX Runtime's optimiser makes of the constants."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx

from mixt_export.staging import require_space
from mixt_export.verification.graph import ExportedGraph
from mixt_export.verification.memory.weights import count_weights
from mixt_export.verification.session import session_options, start_session


def optimised_elements(graph: ExportedGraph, threads: int) -> int:
    """Number of constants in the graph that onnxruntime would execute; its copy of the weights is on disk for a moment.

    Raises ResourceError when the temporary folder cannot hold that copy.
    """
    import onnxruntime as ort

    with tempfile.TemporaryDirectory(prefix="mixt-optimised-") as name:
        folder = Path(name)
        require_space(folder, 2 * count_weights(graph.proto, apart=True).nbytes, "the optimiser's copy of the weights")
        options = session_options(graph, threads)
        # Constant folding and fusions happen up to this level; the ones beyond only change layouts for one CPU.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(folder / "optimised.onnx")
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimised.data")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        options.add_session_config_entry("session.disable_prepacking", "1")
        start_session(graph, graph.proto, threads, options)
        optimised = onnx.load_model(str(folder / "optimised.onnx"), load_external_data=False)
        return count_weights(optimised, apart=True).elements
