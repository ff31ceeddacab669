"""A scikit-learn estimator as a block, and the half of a machine that fits it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lbp import ranks
from lbp.algos.targets.halves import Knob, Place, StepTheta


class Estimator(nn.Module):
    """A scikit-learn regressor as a block's map, (N, in) -> (N, outputs); zeros until it is fitted. It has no derivative.

    Its state is the data of its last `fit`, on which a loaded one is fitted again: checkpoints then hold tensors alone, and
    reading them runs no code. So a `random_state` of None becomes 0. What `partial_fit` leaves cannot be told so, and cannot be saved.
    """

    def __init__(self, estimator, outputs: int):
        super().__init__()
        if "random_state" in (known := estimator.get_params()) and known["random_state"] is None:
            estimator.set_params(random_state=0)
        self.estimator, self.outputs = estimator, outputs
        self.data: dict[str, Tensor] = {}
        self.fitted = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.fitted:
            return x.new_zeros(len(x), self.outputs)
        found = torch.as_tensor(self.estimator.predict(_rows(x).numpy()))
        return found.reshape(len(x), self.outputs).to(x.device, x.dtype)

    def fit(self, x: Tensor, t: Tensor, partial: bool = False) -> None:
        x, t = _rows(x), _rows(t)
        self.data = {} if partial else {"x": x, "t": t}
        getattr(self.estimator, "partial_fit" if partial else "fit")(x.numpy(), (t[:, 0] if self.outputs == 1 else t).numpy())
        self.fitted = True

    def get_extra_state(self) -> dict[str, Tensor]:
        if self.fitted and not self.data:
            raise RuntimeError(f"what partial_fit left in {type(self.estimator).__name__} cannot be saved as tensors; use fit")
        return self.data

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        if state:
            self.fit(state["x"], state["t"])


def _rows(x: Tensor) -> Tensor:
    x = x.detach().flatten(1).cpu()
    return x.float() if x.dtype == torch.bfloat16 else x


class Fit(StepTheta):
    """The block's estimator is fitted to the targets of the batch, anew each time or on top of what it has."""

    doc = "a scikit-learn estimator, fitted to the targets; for blocks that are an Estimator"
    knobs = {"partial": Knob(False, "bool", "partial_fit, which goes on from what it has, in place of fit")}
    writes, leaves, batch_coupled = True, False, True

    def __init__(self, place: Place, *, partial: bool):
        super().__init__()
        if not isinstance(place.block, Estimator):
            raise place.refuse(f"fits a block that is an lbp.algos.targets.Estimator; this is a {type(place.block).__name__}, and no arch= of "
                               "lbp builds one: use it from Python, or choose another half")
        if partial and not hasattr(place.block.estimator, "partial_fit"):
            raise place.refuse(f"partial=true: {type(place.block.estimator).__name__} has no partial_fit")
        self.partial = partial

    def step(self, local, settle):
        parts = ranks.everyones((_rows(local.x), _rows(local.t)))
        local.block.fit(*(torch.cat(side) for side in zip(*parts)), self.partial)
