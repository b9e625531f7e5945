"""fuse(): a network for inference, with batch norms folded into the layers before them and ReLUs done by these."""

from __future__ import annotations

import copy
from collections import Counter

import torch
import torch.nn.functional as F
from torch import fx, nn

from .modules import CMDConv2d, CMDLinear

_CONVOLUTIONS = (CMDConv2d, nn.Conv2d)
_COMPRESSED = (CMDConv2d, CMDLinear)
_LAYERS = (CMDConv2d, CMDLinear, nn.Conv2d, nn.Linear)
_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, _COMPRESSED) or super().is_leaf_module(module, name)


def fuse(model: nn.Module) -> nn.Module:
    """A copy of a network for inference: fewer passes over its activations, the same outputs to rounding.

    A batch norm is folded into the compressed or dense layer whose output it alone reads, and a ReLU that alone reads a
    compressed layer is done by that layer, in the fused convolution before the output leaves the registers; after a
    dense layer it is done in place. Everything else stays.

    Args:
        model: a network that torch.fx can trace (no control flow that depends on data), on any device; unchanged.

    Returns:
        An fx.GraphModule in eval mode without gradients. It can be called, profiled, exported and moved; keep the
        unfused network for `save` and for fine-tuning.

    Raises:
        ValueError: torch.fx cannot trace the model.

    Source: the folding is that of Jacob et al., CVPR 2018, 3.2; for U V + S it scales the rows of U and S.
    """
    fused = copy.deepcopy(model).eval().requires_grad_(False)
    try:
        graph = _Tracer().trace(fused)
    except Exception as error:  # whatever the model's own code raises when it meets a proxy
        raise ValueError(
            f"fuse: torch.fx must be able to trace {type(model).__name__}, got {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no message'}"
        ) from None
    modules = dict(fused.named_modules(remove_duplicate=False))
    calls = Counter(id(modules[node.target]) for node in graph.nodes if node.op == "call_module")

    def module_of(node: fx.Node | None) -> nn.Module | None:
        """The module that a node calls, if nothing else does."""
        module = modules[node.target] if node is not None and node.op == "call_module" else None
        return module if calls[id(module)] == 1 else None

    for node in list(graph.nodes):
        layer = module_of(node)
        if type(layer) not in _LAYERS:
            continue
        norm = module_of(reader := _only_reader(node))
        if type(layer) in _CONVOLUTIONS and type(norm) is nn.BatchNorm2d and norm.track_running_stats:
            _fold(layer, norm)
            _bypass(reader)
        reader = _only_reader(node)
        if reader is not None and _is_relu(reader, modules):
            if type(layer) in _COMPRESSED:
                layer.activation = "relu"
            else:
                with graph.inserting_after(node):
                    reader.replace_all_uses_with(graph.call_function(F.relu_, (node,)))
                    graph.erase_node(reader)
                continue
            _bypass(reader)
    network = fx.GraphModule(fused, graph, type(model).__name__)
    network.delete_all_unused_submodules()
    return network.eval()


def _only_reader(node: fx.Node) -> fx.Node | None:
    """What reads a node, as its only input, if nothing else does."""
    (reader,) = node.users if len(node.users) == 1 else (None,)
    return reader if reader is not None and reader.all_input_nodes == [node] else None


def _bypass(node: fx.Node) -> None:
    node.replace_all_uses_with(node.all_input_nodes[0])
    node.graph.erase_node(node)


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(modules[node.target]) is nn.ReLU
    if node.op == "call_function":
        return node.target in _RELUS
    return node.op == "call_method" and node.target in ("relu", "relu_")


def _fold(layer: nn.Module, norm: nn.BatchNorm2d) -> None:
    """layer <- norm(layer), in float64 until the end."""
    like = layer.u if isinstance(layer, CMDConv2d) else layer.weight
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double()
    if layer.bias is not None:
        shift = shift + layer.bias.double()
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()

    def scaled(parameter: nn.Parameter, factors: torch.Tensor) -> nn.Parameter:
        product = parameter.double() * factors.view(-1, *[1] * (parameter.dim() - 1))
        return nn.Parameter(product.to(parameter.dtype), requires_grad=False)

    if isinstance(layer, CMDConv2d):
        layer.u = scaled(layer.u, scale)
        layer.values = scaled(layer.values, scale.repeat_interleave(layer.row_ptr.diff().long()))
    else:
        layer.weight = scaled(layer.weight, scale)
    layer.bias = nn.Parameter(shift.to(like), requires_grad=False)
