"""Executable forms of factorised linears, what they cost, and the choice between them. Needs numpy, nothing else."""

from mixt_export.plan.choose import Budget, Choice, FormPlan, choose_forms, planned_elements, stored_elements
from mixt_export.plan.cost import CPU, Device, seconds
from mixt_export.plan.forms import Form, forms_of, named_forms
from mixt_export.plan.gpu import Gpu
from mixt_export.plan.mixture import Mixture
from mixt_export.plan.networks import NetworkForm
from mixt_export.plan.objectives import OBJECTIVES, Objective
from mixt_export.plan.operations import Operation
from mixt_export.plan.windows import MixtForm, Window, mixt_forms

__all__ = [
    "CPU",
    "OBJECTIVES",
    "Budget",
    "Choice",
    "Device",
    "Form",
    "FormPlan",
    "Gpu",
    "MixtForm",
    "Mixture",
    "NetworkForm",
    "Objective",
    "Operation",
    "Window",
    "choose_forms",
    "forms_of",
    "mixt_forms",
    "named_forms",
    "planned_elements",
    "seconds",
    "stored_elements",
]
