"""What a compressed model will need, counted from its architecture: no weight is read, numpy is enough."""

from mixt_export.accounting.methods import METHODS, Request
from mixt_export.accounting.report import account
from mixt_export.accounting.source import Source, open_source, presets

__all__ = ["METHODS", "Request", "Source", "account", "open_source", "presets"]
