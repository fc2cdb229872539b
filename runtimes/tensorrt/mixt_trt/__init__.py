"""Build and run TensorRT engines of exported folders: numpy and the board's own TensorRT, nothing else.

``tensorrt`` (10.3 and later) and ``tensorrt_rtx`` are never imported here by name: every function takes the module, so
that one builder serves both and tests can put another in its place.
"""
