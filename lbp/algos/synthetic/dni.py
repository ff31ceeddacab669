from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from lbp.algos import ops
from lbp.algos.local.local import leading
from lbp.algos.rule import Facts, Learned, LearningRule, Phase
from lbp.algos.synthetic.synthesizers import KINDS, Cut, Inputs, features_axis, regress
from lbp.archs.network import Network
from lbp.errors import Refused


class DNI(LearningRule):
    """Decoupled neural interfaces: each block learns from a synthetic gradient, at once, and waits for no block above it.

    At a cut a synthesizer M says s = M(h, context) in place of dL/dh, per sample, as soon as the output h is there; what
    stands between two cuts takes s by ordinary autograd, and so finds the gradient g at its own input, which is s of the cut below
    as that ought to have been: M learns |s - g|^2 (Jaderberg et al. 2017). At the top g is the true loss's. What lies above reaches
    a block only as far as its M has learned it. `context=label` is cDNI. With `mixing` > 0, (1 - mixing) s + mixing g teaches,
    1 being backprop, and with `context=loss` M sees the sample's loss: both then wait, for what they ask for. `inputs` gives what
    stands above a cut a synthetic input, told from x by a model that learns |model(x) - h|^2, so that it waits for no block below
    either; the prediction is the network's own. For `warmup_epochs` blocks learn by backprop, from true inputs, beside models that learn.
    `schedule=streaming` steps a block and its M as soon as they are taught: the same updates.
    """

    facts = Facts(
        family="synthetic", paper="Jaderberg et al., ICML 2017, arXiv 1608.05343",
        weight_transport=False, backward_locked=False, update_locked=False)

    kinds: ClassVar = KINDS

    def __init__(self, network, task, *, cuts: str | int | list[str], context: str, synthesizer: str, hidden: list[int],
                 activation: str, norm: str, kernel: int, mixing: float, inputs: bool, warmup_epochs: int, schedule: str):
        super().__init__(network, task)
        name = "cdni" if context == "label" else "dni"
        try:
            ops.let_errors_pass(network)
        except Refused as refused:
            raise Refused(f"algo={name}: {refused}") from None
        self.context, self.mixing, self.warmup_epochs, self.schedule = context, mixing, warmup_epochs, schedule
        self.segments = segments(list(network.blocks), cuts, name)
        lead = leading(network, name) if context != "none" else ()
        width = {"none": 0, "label": task.outputs, "loss": 1}[context]
        places = {}
        for *_, cut in self.segments[:-1]:
            shape = network.shapes[cut]
            axis = len(shape) - 1 if lead else features_axis(network.blocks[cut], shape)
            places[cut] = Cut(shape, axis, width, hidden, activation, norm, kernel)
        weight = network.head.weight
        self.synthesizers = nn.ModuleDict({cut: self.kinds[synthesizer](place) for cut, place in places.items()}
                                          ).to(weight.device, weight.dtype)
        if inputs:
            if task.symbols:
                raise Refused(f"algo={name} with algo.inputs=true tells a block's input from numbers, and block {self.segments[0][0]} takes "
                              "symbols; set algo.inputs=false")
            no_batch_norm(network, [block for segment in self.segments[1:] for block in segment], name)
            places = {cut: place._replace(hidden=hidden if synthesizer != "linear" else []) for cut, place in places.items()}
        self.inputs = nn.ModuleDict({cut: Inputs(network.in_shape, place) for cut, place in places.items() if inputs}
                                    ).to(weight.device, weight.dtype)
        if any(isinstance(m, ops.BATCH_NORMS) for m in [*self.synthesizers.modules(), *self.inputs.modules()]):
            self.facts = replace(self.facts, batch_coupled=True)

    def groups(self):
        return {"forward": list(self.network.parameters()),
                "feedback": [*self.synthesizers.parameters(), *self.inputs.parameters()]}

    def phases(self):
        warmup = partial(self.learn_from_above, mixing=1.0, inputs=False)
        return [*[Phase("warmup", learn=warmup, epochs=self.warmup_epochs)] * (self.warmup_epochs > 0), *super().phases()]

    def learn(self, x, y, apply):
        if self.mixing or self.context == "loss":
            return self.learn_from_above(x, y, apply, self.mixing, bool(self.inputs))
        context, blocks, said = self.context_of(y), self.values(), {}
        for below, cut, entered, h in self.walk(x, blocks, bool(self.inputs)):
            if cut:
                said[cut] = self.synthesizers[cut](h.detach(), context)
                ops.teach(h, said[cut].detach())
            else:
                _, learned = ops.teach_head(self.task, h, y)
            if below:
                blocks[below] |= regress(said.pop(below), entered.grad, "synthetic")
            self.taught(apply)
        learned.blocks = blocks
        return learned

    def learn_from_above(self, x: Tensor, y: Tensor, apply, mixing: float, inputs: bool) -> Learned:
        """The same from top to bottom, after the whole forward pass: what comes down is at hand, to be mixed in."""
        blocks = self.values()
        *passed, (_, _, above, out) = self.walk(x, blocks, inputs)
        _, learned = ops.teach_head(self.task, out, y)
        self.taught(apply)
        context = self.context_of(y, learned.loss)
        while passed:
            _, cut, entered, h = passed.pop()
            said = self.synthesizers[cut](h.detach(), context)
            blocks[cut] |= regress(said, above.grad, "synthetic")
            ops.teach(h, (1 - mixing) * said.detach() + mixing * above.grad)
            above = entered
            self.taught(apply)
        learned.blocks = blocks
        return learned

    def walk(self, x: Tensor, blocks: dict[str, dict[str, Tensor]], inputs: bool) -> Iterator[tuple[str, str, Tensor, Tensor]]:
        """Runs what stands between cuts, with a graph of its own each: (the cut below, the cut above, input, output)."""
        below, entered, h = "", x, x
        for segment in self.segments:
            if below:
                entered = h.detach().requires_grad_()
                if below in self.inputs:
                    guess = self.inputs[below](x)
                    blocks[below] |= regress(guess, h, "input")
                    entered = guess.detach().requires_grad_() if inputs else entered
            h = entered
            for name in segment:
                h = self.network.blocks[name](h)
            cut = segment[-1] if segment is not self.segments[-1] else ""
            yield below, cut, entered, h
            below = cut

    def context_of(self, y: Tensor, loss: Tensor | None = None) -> Tensor | None:
        """(N, values), or (N, tokens, values) where the network answers tokens."""
        if self.context == "loss":
            return loss.view(y.shape if self.task.classes else y.shape[:1]).unsqueeze(-1)
        return self.task.onehot(y) if self.context == "label" else None

    def values(self) -> dict[str, dict[str, Tensor]]:
        return {cut: {} for cut in self.synthesizers}

    def taught(self, apply) -> None:
        if self.schedule == "streaming":
            apply("forward")
            apply("feedback")


def segments(blocks: list[str], cuts: str | int | list[str], rule: str) -> list[list[str]]:
    """The blocks between cuts, from the input to the last cut, and what is left with the head."""
    *hidden, head = blocks
    if isinstance(cuts, list) and (unknown := [name for name in cuts if name not in hidden]):
        raise Refused(f"algo={rule}: algo.cuts={cuts}: there is no hidden block {unknown[0]}; there are: {', '.join(hidden)}")
    after = hidden if cuts == "all" else hidden[cuts - 1::cuts] if isinstance(cuts, int) else cuts
    if not after:
        raise Refused(f"algo={rule}: algo.cuts={cuts} cuts nothing of {len(hidden)} hidden blocks, which leaves backprop; use algo=bp")
    found: list[list[str]] = [[]]
    for name in hidden:
        found[-1].append(name)
        found += [[]] * (name in after)
    return [*found[:-1], [*found[-1], head]]


def no_batch_norm(network: Network, names: list[str], rule: str) -> None:
    """Raises Refused where statistics of synthetic inputs would be used on true ones at test time."""
    for name in names:
        if any(isinstance(m, ops.BATCH_NORMS) for m in network.blocks[name].modules()):
            raise Refused(f"algo={rule} with algo.inputs=true: block {name} has batch norm, whose statistics would be those of synthetic "
                          "inputs, and the prediction is made from true ones; use arch.norm=layer or none, or another arch=")
