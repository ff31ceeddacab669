from __future__ import annotations

import difflib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lbp.archs.network import Network, as_block, cut, has_weights
from lbp.errors import ConfigError, Refused

# Of each family: the models, and what their forward pass runs, in order. A step that is no attribute of the model is one
# of FUNCTIONS, which torchvision calls without a module.
FAMILIES = [
    (["alexnet", *[f"vgg{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "_bn")],
      "mobilenet_v3_small", "mobilenet_v3_large", *[f"efficientnet_b{i}" for i in range(8)],
      *[f"efficientnet_v2_{size}" for size in "sml"]], "features avgpool flatten classifier"),
    (["mobilenet_v2"], "features mean flatten classifier"),
    ([f"convnext_{size}" for size in ("tiny", "small", "base", "large")], "features avgpool classifier"),
    ([f"densenet{depth}" for depth in (121, 161, 169, 201)], "features relu mean flatten classifier"),
    (["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
      "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"],
     "conv1 bn1 relu maxpool layer1 layer2 layer3 layer4 avgpool flatten fc"),
    ([f"regnet_{kind}_{size}" for kind in "xy" for size in ("400mf", "800mf", "1_6gf", "3_2gf", "8gf", "16gf", "32gf")]
     + ["regnet_y_128gf"], "stem trunk_output avgpool flatten fc"),
]
STEPS = {model: steps.split() for models, steps in FAMILIES for model in models}
FUNCTIONS = {"relu": nn.ReLU, "mean": lambda: nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten}


class Concatenated(nn.Module):
    """A dense layer (Huang et al. 2017) with what it read: its input's channels, then its own."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layer(x)], 1)


def torchvision(task, *, model: str) -> Network:
    """A classifier of torchvision with random weights, cut into blocks whose composition is its forward pass, to the bit.

    A block begins at each layer with weights, or at each unit (residual, dense, inverted, ...), and is called by its path
    in torchvision. Activations in place are made out of place, since rules keep the outputs of blocks. Raises ConfigError for a model that is not among
    those that are known to be cut right, Refused for inputs that it cannot take.
    """
    if model not in STEPS:
        near = difflib.get_close_matches(model, STEPS, 1)
        raise ConfigError(f"arch.model={model}: no model that lbp cuts into blocks; "
                          + (f"did you mean {near[0]}? " if near else "") + f"allowed: {', '.join(STEPS)}")
    if len(task.in_shape) != 3 or task.in_shape[0] != 3:
        raise Refused(f"arch=torchvision takes images of 3 channels, not inputs of shape {task.in_shape}; use a dataset in "
                      "colour, or arch=resnet18, arch=vgg8b, arch=vit or arch=mlp")
    try:
        from torchvision import models
    except Exception as cause:      # a mismatched binary raises RuntimeError, OSError, AttributeError ...
        raise ConfigError(f"arch=torchvision needs the package torchvision, which cannot be imported ({type(cause).__name__}: "
                          f"{cause}): pip install --upgrade torchvision, in the version that belongs to this torch") from cause
    whole = models.get_model(model, weights=None, num_classes=task.outputs)
    for module in whole.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
    names, modules = zip(*[part for step in STEPS[model]
                           for part in _parts(step, getattr(whole, step, None) or FUNCTIONS[step]())])
    starts = [name.replace("-", "_") for name, module in zip(names, modules) if has_weights(module)]
    *hidden, (head,) = cut(modules)
    network = Network({**{name: as_block(group) for name, group in zip(starts, hidden)}, "head": head}, task.in_shape)
    try:
        _ = network.shapes
    except RuntimeError as error:
        if min(task.in_shape[1:]) >= 64:
            raise
        raise Refused(f"arch.model={model}: {task.in_shape[1]}x{task.in_shape[2]} images are too small for it "
                      f"({str(error).splitlines()[0]}); set a larger dataset.resize (64 does for all)") from None
    return network


def _parts(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The steps of a module that runs its children in a row, with their paths; the module itself if it does more."""
    if type(module).__name__ == "_DenseBlock":      # its layers read all that came before in the block
        for name, layer in module.items():
            yield f"{path}_{name}", Concatenated(layer)
    elif type(module).forward is nn.Sequential.forward:
        for name, child in module.named_children():
            yield from _parts(f"{path}_{name}", child)
    else:
        yield path, module
