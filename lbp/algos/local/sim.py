from __future__ import annotations

from torch import Tensor, nn

from lbp.algos import ops
from lbp.algos.local.local import leading, lesson_of, tapped_shapes
from lbp.algos.rule import Facts, LearningRule
from lbp.archs.network import Network
from lbp.errors import Refused


class Sim(LearningRule):
    """Similarity matching: each hidden block learns to make samples as alike as their labels are.

    The loss of a block is the mean squared difference of two N x N matrices, the cosine similarities of the rows of a
    learned linear map of its activations (dense, or a 3x3 convolution), and those of the one-hot labels, rows
    centred; of feature maps the standard deviation over positions is compared (Nokland & Eidnes 2019, the similarity
    matching loss). It looks before dropout and pooling. No gradient crosses a block; the head learns on the last block's
    detached output. Under several ranks each compares its own samples.
    """

    facts = Facts(
        family="local", paper="Nokland & Eidnes, ICML 2019, arXiv 1901.06656",
        weight_transport=False, backward_locked=False, update_locked=False, batch_coupled=True)

    tap = "activation"

    def __init__(self, network, task, *, schedule: str):
        super().__init__(network, task)
        self.schedule = schedule
        self.maps = similarity_maps(network, task, "sim")

    def groups(self):
        return {"forward": list(self.network.parameters()), "heads": list(self.maps.parameters())}

    def learn_block(self, name, h, y):
        return lesson_of(self, name, *h, y)

    def local_loss(self, name: str, h: Tensor, y: Tensor):
        loss = similarity_loss(self.maps[name](h), self.task.onehot(y))
        return len(h) * loss, {"local_loss": loss.detach()}


def similarity_loss(z: Tensor, labels: Tensor) -> Tensor:
    """The mean over all pairs of samples of the squared difference of their similarities in z and in the labels, 0-dim."""
    with ops.full_precision(z):
        found = similarity(z)
        return (found - similarity(labels).to(found.dtype)).square().mean()


def similarity(z: Tensor) -> Tensor:
    """(N, N): cosines of the rows of z, each less its mean. Maps (N, C, H, W) and tokens (N, T, width) give a row of the standard
    deviations over positions, maps of at most 3 channels or one row their values."""
    z = ops.at_least_fp32(z)
    if z.dim() == 4 and z.shape[1] > 3 and z.shape[2] > 1:
        z = z.flatten(2).std(2)
    elif z.dim() == 3 and z.shape[1] > 1:
        z = z.std(1)
    centred = z.flatten(1) - z.flatten(1).mean(1, keepdim=True)
    rows = centred / (centred.norm(dim=1, keepdim=True) + 1e-8)
    return rows @ rows.T


def similarity_maps(network: Network, task, rule: str) -> nn.ModuleDict:
    """For each hidden block a linear map from its activations to others of their shape."""
    ops.classification(task, rule)
    if leading(network, rule):
        raise Refused(f"algo={rule} compares samples by their one label, and block head answers each token; use algo=local")
    maps = {}
    for name, shape in tapped_shapes(network, "activation").items():
        if len(shape) == 3:
            maps[name] = nn.Conv2d(shape[0], shape[0], 3, padding=1, bias=False)
        elif len(shape) < 3:
            maps[name] = nn.Linear(shape[-1], shape[-1], bias=False)
        else:
            raise Refused(f"algo={rule} compares vectors, maps (channels, height, width) and tokens; block {name} has outputs of "
                          f"shape {shape}; use algo=local")
    return nn.ModuleDict(maps).to(network.head.weight.device, network.head.weight.dtype)
