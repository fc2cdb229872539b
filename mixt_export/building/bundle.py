"""OUT/device of a TensorRT folder: the scripts a board needs, and the trtexec command for this very export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from mixt_export.building.toolkit import bundle_folder, toolkit
from mixt_export.errors import UsageError
from mixt_export.resources import resource

DEVICE_FOLDER = "device"
TRTEXEC_FILE = "trtexec.sh"

#: Sampling, tokenizer and the loop over tokens are those of the ONNX Runtime runner.
_SHARED = ("ort/mixt_ort.py",)

_SCRIPT = """\
#!/bin/sh
# The same engine with NVIDIA's own tool. The engine it writes carries no stamp: check_parity.py and run.py take those
# of build_engine.py. {profiles}
set -e
cd "$(dirname "$0")/.."
PATH="$PATH:/usr/src/tensorrt/bin"  # where JetPack puts it
{command}
"""


def write_bundle(folder: Path) -> Path:
    """Write ``folder``/device for the exported ``folder``, whose manifest is already there; returns it.

    Raises UsageError when the folder was not exported for target trt or its profiles contradict themselves.
    """
    device = folder / DEVICE_FOLDER
    # Sources of kernels stay here: a board gets them compiled, see kernels.carry_kernels.
    left = shutil.ignore_patterns("__pycache__", "kernels")
    shutil.copytree(bundle_folder(), device, ignore=left, dirs_exist_ok=True)
    for name in _SHARED:
        shutil.copyfile(resource("runtimes") / name, device / Path(name).name)
    manifest_module = toolkit("manifest")
    try:
        manifest = manifest_module.read_manifest(folder)
    except toolkit("errors").TrtError as error:
        raise UsageError(str(error)) from error
    one = (manifest_module.merged(manifest.profiles),)
    command = toolkit("trtexec").trtexec_command(manifest.tensorrt, one)
    script = device / TRTEXEC_FILE
    note = f"One profile: {json.dumps(one[0].name)}, as build_engine.py builds by default."
    script.write_text(_SCRIPT.format(command=command, profiles=note), encoding="utf-8")
    script.chmod(0o755)
    return device
