"""Image classifiers for 32x32 input, and the names that a `--model` option understands."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable
from types import ModuleType

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

NORMALIZATION: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "resnet20": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "resnet56": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "vgg16": ((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)),
}
"""(mean, std) per channel, on pixels scaled to 0..1, that the pretrained networks were trained with."""

_VGG16 = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512, "pool")


class PadShortcut(nn.Module):
    """Parameter-free shortcut (option A): every `stride`-th pixel, new channels filled with zeros on both sides."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        """[b, in_channels, h, w] -> [b, out_channels, ceil(h / stride), ceil(w / stride)]."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut around them."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, projection: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            if projection:
                conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
                self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out_channels))
            else:
                self.shortcut = PadShortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[b, in_channels, h, w] -> [b, out_channels, h / stride, w / stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Residual network whose first convolution keeps the resolution; each later stage halves it.

    Source: He et al., Deep Residual Learning for Image Recognition, sections 4.1 and 4.2.
    """

    def __init__(
        self, blocks: Iterable[int], width: int, projection: bool, num_classes: int = 10, in_channels: int = 3
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.stages: list[str] = []
        channels = width
        for stage, count in enumerate(blocks):
            out_channels = width << stage
            layers = []
            for block in range(count):
                layers.append(BasicBlock(channels, out_channels, 2 if stage and not block else 1, projection))
                channels = out_channels
            self.stages.append(f"layer{stage + 1}")
            self.add_module(self.stages[-1], nn.Sequential(*layers))
        self.linear = nn.Linear(channels, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """[b, in_channels, h, w] -> logits [b, num_classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


class ConvNet(nn.Module):
    """A stack of convolutions and poolings, averaged to `pooled` x `pooled` pixels, then a classifier."""

    def __init__(self, features: nn.Sequential, pooled: int, classifier: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.avgpool = nn.AdaptiveAvgPool2d(pooled)
        self.classifier = classifier
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """[b, in_channels, h, w] -> logits [b, num_classes]."""
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def _initialize(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def alexnet(num_classes: int = 10, in_channels: int = 3) -> ConvNet:
    """AlexNet for 32x32 input: five 3x3 convolutions and three linear layers.

    Source: Krizhevsky et al., ImageNet Classification with Deep Convolutional Neural Networks; torchvision's widths.
    """

    def conv(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.ReLU(inplace=True)]

    def pool() -> nn.Module:
        return nn.MaxPool2d(2)

    features = nn.Sequential(
        *conv(in_channels, 64, stride=2),
        pool(),
        *conv(64, 192),
        pool(),
        *conv(192, 384),
        *conv(384, 256),
        *conv(256, 256),
        pool(),
    )
    classifier = nn.Sequential(
        nn.Dropout(),
        nn.Linear(256 * 2 * 2, 4096),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(4096, 4096),
        nn.ReLU(inplace=True),
        nn.Linear(4096, num_classes),
    )
    return ConvNet(features, 2, classifier)


def vgg16(num_classes: int = 10, in_channels: int = 3) -> ConvNet:
    """VGG-16 with batch norm for 32x32 input: convolutions without bias, one linear layer.

    Source: Simonyan and Zisserman, Very Deep Convolutional Networks, configuration D.
    """
    layers: list[nn.Module] = []
    channels = in_channels
    for width in _VGG16:
        if width == "pool":
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        channels = width
    return ConvNet(nn.Sequential(*layers), 1, nn.Linear(channels, num_classes))


def resnet18(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-18 for 32x32 input: ImageNet widths and projection shortcuts, 3x3 first convolution, no first pooling."""
    return ResNet((2, 2, 2, 2), 64, True, num_classes, in_channels)


def resnet20(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-20: three stages of three blocks, widths 16, 32, 64, parameter-free shortcuts."""
    return ResNet((3, 3, 3), 16, False, num_classes, in_channels)


def resnet56(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-56: three stages of nine blocks, widths 16, 32, 64, parameter-free shortcuts."""
    return ResNet((9, 9, 9), 16, False, num_classes, in_channels)


_BUILDERS = {build.__name__: build for build in (alexnet, vgg16, resnet18, resnet20, resnet56)}


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Fill `model` from a safetensors file, cast to the model's dtypes.

    Args:
        model: changed only if the whole file fits. Batch-norm counters (`num_batches_tracked`) may be absent.
        path: the safetensors file.

    Returns:
        `model`.

    Raises:
        ValueError: the file is not safetensors, or its keys or shapes are not the model's.
    """
    try:
        loaded = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"load_weights: {path} is not a readable safetensors file: {error}") from error
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    counters = {name for name in own if name.endswith("num_batches_tracked")}
    problems = {
        "missing": sorted(own.keys() - loaded.keys() - counters),
        "unexpected": sorted(loaded.keys() - own.keys()),
        "misshapen": [
            f"{name} (want {list(own[name].shape)}, got {list(loaded[name].shape)})"
            for name in sorted(own.keys() & loaded.keys())
            if own[name].shape != loaded[name].shape
        ],
    }
    if any(problems.values()):
        found = "; ".join(f"{len(names)} {kind}: {_shorten(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"load_weights: {path} does not fit {type(model).__name__}: {found}")
    with torch.no_grad():
        for name, value in loaded.items():
            own[name].copy_(value)
    return model


def _shorten(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def create(name: str, **kwargs: object) -> nn.Module:
    """Build the network that a `--model` string names.

    Args:
        name: `alexnet`, `vgg16`, `resnet18`, `resnet20`, `resnet56`, `torchvision:NAME`, `timm:NAME`, or
            `package.module:callable` for any callable that returns a network.
        **kwargs: passed to the builder as they are.

    Returns:
        The network, on the device and with the weights that its builder chose.

    Raises:
        ValueError: no such name, or the callable does not exist.
        ImportError: the module of the name cannot be imported.
        TypeError: the callable returned something that is not a torch.nn.Module.
    """
    source, colon, target = name.partition(":")
    if not colon:
        builder: Callable[..., object] | None = _BUILDERS.get(name)
        wanted = f"one of {', '.join(_BUILDERS)}, torchvision:NAME, timm:NAME or module:callable"
    elif source == "torchvision":
        builder, wanted = _torchvision_builder(name, target), "a classifier of torchvision.models.list_models()"
    elif source == "timm":
        builder, wanted = _timm_builder(name, target), "a name of timm.list_models()"
    else:
        builder, wanted = _attribute(_import(name, source), target), f"a callable of module {source}"
    if not callable(builder):
        raise ValueError(f"model: wanted {wanted}, got {name!r}")
    model = builder(**kwargs)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: {name} must return a torch.nn.Module, got {type(model).__name__}")
    return model


def _import(name: str, module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError, ValueError) as error:
        raise ImportError(f"model: {name!r} needs the module {module!r}, which cannot be imported: {error}") from error


def _attribute(module: ModuleType, target: str) -> object:
    found: object = module
    for part in target.split("."):
        found = getattr(found, part, None)
    return found


def _torchvision_builder(name: str, target: str) -> Callable[..., object] | None:
    _import(name, "torchvision")
    models = _import(name, "torchvision.models")
    return models.get_model_builder(target) if target in models.list_models() else None


def _timm_builder(name: str, target: str) -> Callable[..., object] | None:
    timm = _import(name, "timm")
    if not timm.is_model(target):
        return None
    return lambda **kwargs: timm.create_model(target, **kwargs)
