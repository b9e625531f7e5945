"""DeepSparse as a rival: one sparse convolution as an ONNX graph, compiled for the size of x."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from cmd_ext import CMDConv2d
from cmd_ext.bench.machine import optional
from cmd_ext.bench.timing import Call


def sparse_engine(layer: CMDConv2d, x: Tensor) -> dict[str, Call]:
    """The rival by name; empty where the package is missing or does not take x."""
    deepsparse = optional("deepsparse")
    if deepsparse is None or x.device.type != "cpu" or x.dtype != torch.float32:
        return {}
    images = [x.numpy()]

    @cache
    def engine():  # in the first call, where what does not work leaves the rival out
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "conv.onnx"
            file.write_bytes(_graph(layer, x))
            return deepsparse.compile_model(str(file), batch_size=len(x), num_cores=torch.get_num_threads())

    return {"DeepSparse": lambda: torch.from_numpy(engine().run(images)[0])}


def _graph(layer: CMDConv2d, x: Tensor) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    with torch.no_grad():
        size = list(layer.to_dense()(x).shape)
    stride, (pad, _) = list(layer.stride), layer.padding
    geometry = {"kernel_shape": list(layer.kernel_size), "pads": [pad] * 4, "strides": stride}
    node = helper.make_node("Conv", ["x", "weight", "bias"], ["y"], **geometry)
    sizes = {"x": list(x.shape), "y": size}
    x_info, y_info = (helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes[name]) for name in sizes)
    weights = {"weight": layer.dense_weight(), "bias": layer.bias}
    constants = [numpy_helper.from_array(value.detach().numpy(), name) for name, value in weights.items()]
    graph = helper.make_graph([node], "conv", [x_info], [y_info], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)])
    model.ir_version = 7  # the newest that the engine reads
    return model.SerializeToString()
