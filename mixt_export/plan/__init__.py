"""Executable forms of factorised linears, what they cost, and the choice between them. Needs numpy, nothing else."""

from mixt_export.plan.choose import OBJECTIVES, Choice, FormPlan, Objective, choose_forms
from mixt_export.plan.cost import CPU, Device, seconds
from mixt_export.plan.forms import Form, Window, mixt_forms
from mixt_export.plan.mixture import Mixture

__all__ = [
    "CPU",
    "OBJECTIVES",
    "Choice",
    "Device",
    "Form",
    "FormPlan",
    "Mixture",
    "Objective",
    "Window",
    "choose_forms",
    "mixt_forms",
    "seconds",
]
