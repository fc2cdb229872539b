"""A plan as data: the manifest's key ``plan``, and what `mixt inspect` says of a model folder."""

from __future__ import annotations

from typing import Any

from mixt_export.plan.choose import Choice, FormPlan
from mixt_export.plan.windows import MixtForm


def plan_entry(forms: FormPlan) -> dict[str, Any]:
    """Executable forms of the factorised linears: how they were chosen, what they hold, and each with its reason."""
    return {
        "optimize_for": forms.objective.name,
        "device": forms.device.name,
        "elements": {
            "stored": forms.stored_elements,
            "planned": forms.planned_elements,
            "dense": forms.dense_elements,
        },
        "forms": {
            name: {**_form(choice), **_shared(forms, name), **_many(forms, name)}
            for name, choice in forms.choices.items()
        },
        **({"switch": forms.switch} if forms.many else {}),
    }


def _many(forms: FormPlan, name: str) -> dict[str, Any]:
    """The form of runs of ``switch`` tokens and more, where it is another."""
    if name not in forms.many:
        return {}
    choice = forms.many[name]
    return {"many": choice.form.name, "many_macs": choice.form.macs, "many_reason": choice.reason}


def _shared(forms: FormPlan, name: str) -> dict[str, str]:
    """Of a step that several linears share the tensor it reads, of what reads its output its name."""
    found = {}
    if name in forms.sharing.heads:
        found["core"] = forms.choices[name].linear.branches[0].cores[0].tensor.name
    if name in forms.sharing.reads:
        found["after"] = forms.sharing.reads[name]
    return found


def _form(choice: Choice) -> dict[str, Any]:
    form = choice.form
    windows = {"windows": list(form.partition)} if isinstance(form, MixtForm) else {}
    return {
        "form": form.name,
        "method": choice.linear.method,
        "in_features": form.in_features,
        "out_features": form.out_features,
        **windows,
        "elements": form.elements,
        "macs": form.macs,
        "transposes": form.transposes,
        "gains": {str(rows): round(gain, 3) for rows, gain in choice.gains.items()},
        "reason": choice.reason,
    }
