"""Plans: what each layer becomes, and putting that into a network."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from . import distributed, fingerprints, forms, report
from .calibrate import batches_of
from .candidates import LAYER_OF
from .modules import replace
from .refit import MEMORY, Fit, fit_layers

PLAN_VERSION = 2  # 1 knows the channel form only and is written where that is enough

_log = distributed.logger(__name__)


@dataclass
class Plan:
    """What each layer becomes: enough to compress a fresh copy of the same trained network again.

    Attributes:
        layers: name -> {"rank", "nnz", "shape": [m, n], "groups"}, and "form" where it is not "channel".
        skipped: name -> why the layer stays dense.
        n_iter: passes of the fit.
        data_aware: whether the layers were fitted to calibration data.
        sequential: layers a pass of a sequential fit; 0 if it was none.
        fingerprints: hashes of the "weights" and of the calibration "data" that it was made with.
    """

    layers: dict[str, dict]
    skipped: dict[str, str] = field(default_factory=dict)
    n_iter: int = 20
    data_aware: bool = False
    sequential: int = 0
    fingerprints: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        version = 2 if any("form" in entry for entry in self.layers.values()) else 1
        fit = {"n_iter": self.n_iter, "data_aware": self.data_aware, "sequential": self.sequential}
        content = {"cmd_ext_plan": version, **fit, "layers": self.layers, "skipped": self.skipped}
        if self.fingerprints:
            content["fingerprints"] = self.fingerprints
        return json.dumps(content, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Reads what to_json wrote.

        Raises:
            ValueError: not a plan of a version that this one reads, or an unknown form.
        """
        try:
            content = json.loads(text)
            if content["cmd_ext_plan"] not in range(1, PLAN_VERSION + 1):
                raise ValueError(f"Plan: want version 1 to {PLAN_VERSION}, got {content['cmd_ext_plan']!r}")
            layers = {
                str(name): {
                    "rank": int(entry["rank"]),
                    "nnz": int(entry["nnz"]),
                    "shape": [int(size) for size in entry["shape"]],
                    "groups": int(entry["groups"]),
                }
                for name, entry in content["layers"].items()
            }
            for name, entry in content["layers"].items():
                if "form" in entry:
                    layers[name]["form"] = entry["form"]
                    if entry["form"] not in forms.FORMS:
                        raise ValueError(f"Plan: want a form {' or '.join(forms.FORMS)}, got {entry['form']!r}")
            how = bool(content.get("data_aware", False)), int(content.get("sequential", 0))  # older plans lack these
            prints = {str(name): str(value) for name, value in content.get("fingerprints", {}).items()}
            return cls(layers, dict(content["skipped"]), int(content["n_iter"]), *how, prints)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"Plan: want the JSON of Plan.to_json, got {text[:40]!r}... ({error!r})") from None


def plan_of(layers, pinned, choice, skipped, n_iter: int = 20) -> Plan:
    """What a search chose, and what overrides pinned."""
    plan = Plan({}, dict(skipped), n_iter)
    for layer in layers:
        if layer.name in pinned:
            rank, nnz, form = pinned[layer.name]
        else:
            rank, nnz, form = choice[layer.name].rank, choice[layer.name].nnz, choice[layer.name].form
        if rank is None:
            reason = f"{layer.m}x{layer.n} would not pay: dense is the better use of the budget"
            plan.skipped.setdefault(layer.name, reason)
        else:
            plan.layers[layer.name] = {"rank": rank, "nnz": nnz, "shape": [layer.m, layer.n], "groups": layer.groups}
            if form != "channel" and rank > 0:
                plan.layers[layer.name]["form"] = form
    return plan


def apply_plan(
    fresh_model: nn.Module,
    plan: Plan,
    *,
    calibration: Iterable | None = None,
    memory: int = MEMORY,
    seed: int = 0,
    progress: bool = False,
) -> nn.Module:
    """Decomposes the layers of a trained network as a plan says, in place.

    Args:
        fresh_model: the network whose plan it is.
        plan: from compress.
        calibration: batches as for compress: the layers are fitted to their outputs on them, sequentially where the
            plan says so. None: to their weights, which is less than what a plan with data_aware=True stands for.
        memory, seed: as for compress.
        progress: show a bar (with tqdm).

    Returns:
        fresh_model (or its replacement, where the model itself is one layer). The same weights, plan and calibration
        data give the same result; batch-norm statistics are left alone.

    Raises:
        ValueError: the plan names a layer that is missing or has another shape, no batch, NaN or Inf in the data; the
            model is then unchanged.
    """
    batches = batches_of(calibration) if calibration is not None else []
    weights = plan.fingerprints.get("weights")
    if weights is not None and weights != fingerprints.of_model(fresh_model):
        _log.warning("apply_plan: the plan was made for other weights; its sizes may suit these less")
    if plan.data_aware and not batches:
        _log.warning("apply_plan: the plan was fitted to calibration data; without it, layers are fitted to weights")
    return fit_plan(fresh_model, plan, batches, memory, seed, progress)[0]


def fit_plan(
    model: nn.Module, plan: Plan, batches: list, memory: int, seed: int, progress: bool
) -> tuple[nn.Module, dict[str, Fit]]:
    """apply_plan, with how each layer was fitted."""
    modules = dict(model.named_modules())
    for name, entry in plan.layers.items():
        module = modules.get(name)
        got = f"no {name!r}" if module is None else f"{type(module).__name__} {name!r}"
        if type(module) in LAYER_OF:
            shape, groups = [len(module.weight), module.weight[0].numel()], getattr(module, "groups", 1)
            if (shape, groups) == (entry["shape"], entry["groups"]):
                forms.check_form(f"apply_plan: {name!r}", entry.get("form", "channel"), module.weight.shape[2:])
                continue
            got += f" {shape} with {groups} groups"
        wanted = f"a convolution or linear layer {name!r} {entry['shape']} with {entry['groups']} groups"
        raise ValueError(f"apply_plan: the plan wants {wanted}, got {got}")
    with report.Bar(len(plan.layers), "decompose", progress) as bar:
        options = {"n_iter": plan.n_iter, "sequential": plan.sequential, "memory": memory, "seed": seed}
        fits = fit_layers(model, plan.layers, batches, step=bar.step, **options)
    return apply_fits(model, fits), fits


def apply_fits(model: nn.Module, fits: dict[str, Fit]) -> nn.Module:
    """Puts fitted layers in the place of the dense ones; returns the model (or the layer that replaces it)."""
    for name, fit in fits.items():
        dense = model.get_submodule(name)
        model = replace(model, name, LAYER_OF[type(dense)]._from_fit(dense, fit.decomposition))
    return model
