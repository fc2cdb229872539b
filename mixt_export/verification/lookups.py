"""What PyTorch looks up before its first block: embeddings of tokens, rotary cosines and sines of positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from mixt_export.verification.session import Ids
    from mixt_export.verification.torch_model import TorchModel


class _FirstBlock(Exception):  # noqa: N818 (no error: it ends a forward pass where enough is known)
    """The first block was reached."""


def first_input(model: TorchModel, tokens: Ids, hooks: Any = ()) -> NDArray[np.float32]:
    """What the first block is given for ``tokens`` (seq,) from position 0, (seq, hidden) float32.

    Nothing after that runs. ``hooks``: handles to remove afterwards.
    """
    import torch

    found: list[Any] = []

    def stop(_module: Any, args: Any, kwargs: Any) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise _FirstBlock

    handle = model.blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.inference_mode():
            model.model(input_ids=torch.from_numpy(np.ascontiguousarray(tokens[None, :])), use_cache=False)
    except _FirstBlock:
        pass
    finally:
        for each in (handle, *hooks):
            each.remove()
    values: NDArray[np.float32] = found[0].detach()[0].float().numpy()
    return values


def rotary_tables(model: TorchModel, positions: int) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Cosines and sines (positions, rotary_dim) of every kind of rotary embedding that the model computes.

    Each is the model's own module, called as the model calls it but for all positions. Empty for models without such
    a module.
    """
    import torch

    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def record(module: Any, args: Any, kwargs: Any) -> None:
        calls.append((module, args, dict(kwargs)))

    modules = [module for module in model.model.modules() if type(module).__name__.endswith("RotaryEmbedding")]
    hooks = [module.register_forward_pre_hook(record, with_kwargs=True) for module in modules]
    first_input(model, np.zeros(1, np.int64), hooks)
    where = torch.arange(positions)[None, :]
    found = []
    for module, args, kwargs in calls:
        with torch.inference_mode():
            if "position_ids" in kwargs:
                kwargs["position_ids"] = where
            else:
                args = (args[0], where, *args[2:])
            cos, sin = module(*args, **kwargs)
        found.append((cos[0].double().numpy(), sin[0].double().numpy()))
    return found
