"""The trtexec command that builds the same engine: text, for people who prefer NVIDIA's own tool."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from .manifest import GRAPH_FILE, Profile


def trtexec_command(tensorrt: str, profiles: Sequence[Profile], workspace: int | None = None) -> str:
    """One shell command, run in the exported folder, for trtexec of version ``tensorrt`` ("10.3").

    Version 10 needs ``--stronglyTyped``; from 11 on every network is.
    """
    words = ["trtexec", f"--onnx={GRAPH_FILE}", "--saveEngine=model.engine", "--skipInference", "--noTF32"]
    if tensorrt.startswith("10."):
        words.append("--stronglyTyped")
    if workspace is not None:
        words.append(f"--memPoolSize=workspace:{max(1, workspace >> 20)}M")
    for index, profile in enumerate(profiles):
        if len(profiles) > 1:
            words.append(f"--profile={index}")
        for option, bound in (("minShapes", 0), ("optShapes", 1), ("maxShapes", 2)):
            shapes = (f"{name}:{'x'.join(map(str, shape[bound]))}" for name, shape in profile.inputs.items())
            words.append(f"--{option}={','.join(shapes)}")
    return " \\\n  ".join(map(shlex.quote, words))
