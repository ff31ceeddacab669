from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from lbp.algos import ops
from lbp.algos.forward.sigprop_losses import LOSSES, Streams, similarity
from lbp.algos.forward.sigprop_parts import channels_of, parts, shapes_of, statistics_kept
from lbp.algos.forward.sigprop_signals import Digits, LabelProjection
from lbp.algos.rule import Facts, Learned, LearningRule, Lesson, learn_by_blocks
from lbp.archs.network import Network
from lbp.errors import Refused


class SigProp(LearningRule):
    """Signal propagation: the label goes forward through the same layers as the input, and each layer matches the two.

    A signal S turns the label into values t that the layers take; h_l = f_l(h_{l-1}), t_l = f_l(t_{l-1}) with the same weights,
    and a loss at each layer makes h_l most similar to the t_l of its class (Kohan, Rietman & Siegelmann 2023). No gradient
    crosses a layer. The head is an ordinary classifier of what the last layer gives; no label enters at test time.

    `signal=both` projects label and input: h_1 = f_1(x), t_1 = S(label), so that the first block is the input's own. With the
    other signals t_0 stands beside the input and all blocks see both. `stream=classes` sends one target a class, `samples` one a
    sample (then the batch is coupled). A loop back sends the output's error (of a class the mean over its samples) in place of
    the label: mode=loop_back after a first pass that learns nothing, forward_loop_back after one that learned from the label;
    then a block does wait for the output. A block's loss stands before its pool. Batch norm normalises each stream by itself,
    which it must, as targets are no inputs; its running statistics are the input's alone.
    """

    facts = Facts(
        family="forward", paper="Kohan, Rietman & Siegelmann, IEEE TNNLS (2023), arXiv 2204.01723",
        weight_transport=False, backward_locked=False, update_locked=False)
    losses: ClassVar[dict[str, Callable]] = LOSSES

    def __init__(self, network, task, *, signal: str, stream: str, mode: str, loss: str, k: int, temperature: float | str,
                 granularity: str, schedule: str, fixed: list[str], passed: list[str]):
        super().__init__(network, task)
        ops.classification(task, "sigprop")
        refuse(network, task, signal, stream, loss, fixed, passed)
        self.stream, self.mode, self.schedule, self.temperature = stream, mode, schedule, temperature
        self.loss = partial(self.losses[loss], k=k) if loss == "top_k" else self.losses[loss]
        projects_input = signal in ("both", "fixed_both")
        self.fixed = {*fixed, *(list(network.hidden)[:1] if signal == "fixed_both" else ())}
        self.passed = [network.hidden[name] for name in network.hidden if name in passed]
        self.names = [name for name in network.blocks if name not in passed]     # those that learn by themselves, the head with what is passed
        taught = {name: block for name, block in network.hidden.items() if name not in passed}
        self.parts = list(parts(taught, granularity, projects_input))
        shapes = shapes_of(network, self.parts)
        self.channels = [channels_of(network, part, shape) for part, shape in zip(self.parts, shapes)]
        weight = network.head.weight
        self.projection = (Digits if signal == "digits" else LabelProjection)(task.classes, shapes[0]).to(weight.device, weight.dtype)
        self.projection.requires_grad_(signal in ("both", "label"))
        self.facts = replace(self.facts, batch_coupled=stream == "samples" or mode != "forward", labels_at_input=not projects_input,
                             update_locked=mode != "forward" or bool(passed), weight_transport=bool(passed), backward_locked=len(passed) > 1)

    def groups(self):
        groups = {"forward": [p for name, block in self.network.blocks.items() if name not in self.fixed for p in block.parameters()]}
        learned = [p for p in self.projection.parameters() if p.requires_grad]
        return groups | ({"heads": learned} if learned else {})

    def learn(self, x, y, apply):
        *taught, head = self.names
        streaming = self.schedule == "streaming"
        h = self.enter(x, y) if self.mode != "loop_back" else (x, *self.errors(self.look(x), y))
        h, learned = learn_by_blocks(self, taught, h, y, apply, streaming)
        blocks = learned.blocks
        if self.mode == "forward_loop_back":
            h, learned = learn_by_blocks(self, taught, (x, *self.errors(h[0], y)), y, apply, streaming)
            blocks |= learned.blocks
        _, learned = learn_by_blocks(self, [head], h, y, apply, streaming)
        return Learned(learned.out, learned.loss, blocks)

    def enter(self, x, y):
        return x, *self.labels(y)

    def learn_block(self, name, h, y):
        """Both streams through the layers of a block. `h`: the input's, the target's t (R, classes) or what was made of it, and `labels`
        (R,) and `own` (N,) as in Streams."""
        h, t, labels, own = h
        if name == self.names[-1]:
            out = self.classify(h)
            loss = self.task.loss(out, y)
            return Lesson(loss, told=loss.detach(), out=out.detach())
        losses, values = [], {}
        for part, channels in zip(self.parts, self.channels):
            if part.block != name:
                continue
            h0, t0 = h, t
            with torch.set_grad_enabled(part.has_weights and part.block not in self.fixed):
                h = part.run(h0)
                if part is not self.parts[0]:
                    with statistics_kept(self.network.hidden[part.block]):
                        t = part.run(t0)
            if part is self.parts[0]:
                t = self.projection(t0)
            if h.requires_grad or t.requires_grad:
                scale = math.sqrt(channels) if self.temperature == "auto" else self.temperature
                loss, hit = self.match(Streams(h, t, h0, t0, y, labels, own, similarity(h, t, channels) / scale))
                values |= {f"local_loss{part.suffix}": loss.detach().mean(), f"local_accuracy{part.suffix}": hit.to(loss.dtype).mean()}
                losses.append(loss)
            with torch.no_grad():
                h, t = part.after(h.detach()), part.after(t.detach())
        return Lesson(sum(losses) if losses else None, (h, t, labels, own), values)

    def classify(self, h: Tensor) -> Tensor:
        for block in self.passed:
            h = block(h)
        return self.network.head(h)

    def look(self, x: Tensor) -> Tensor:
        """What the classifier reads, in a pass that learns nothing."""
        with torch.no_grad(), statistics_kept(self.network):
            for block in list(self.network.hidden.values())[: -len(self.passed) or None]:
                x = block(x)
        return x

    def match(self, streams: Streams) -> tuple[Tensor, Tensor]:
        """Each sample's loss, and whether the target most similar to it is of its class."""
        return self.loss(streams), streams.labels[streams.logits.argmax(1)] == streams.y

    def labels(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the signal carries, of which classes, and which is each sample's own."""
        if self.stream == "samples":
            return self.task.onehot(y), y, torch.arange(len(y), device=y.device)
        every = torch.arange(self.task.classes, device=y.device)
        return self.task.onehot(every), every, y

    def errors(self, h: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same with the errors at the output that `h` leads to in place of labels."""
        with torch.no_grad(), statistics_kept(self.network):
            error = self.task.error(self.classify(h), y).to(self.task.dtype)
        if self.stream == "samples":
            return error, y, torch.arange(len(y), device=y.device)
        return class_means(error, y, self.task.onehot(y))


def class_means(values: Tensor, y: Tensor, onehot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means over each class's samples on all ranks, (classes present, k); those classes; the place of each sample's class."""
    sums, counts = onehot.T @ values, onehot.sum(0)
    ops.over_ranks(sums, counts)
    present = counts > 0
    return sums[present] / counts[present, None], present.nonzero()[:, 0], (present.cumsum(0) - 1)[y]


def refuse(network: Network, task, signal: str, stream: str, loss: str, fixed: list[str], passed: list[str]) -> None:
    """Raises Refused for what cannot be taught so."""
    hidden = list(network.hidden)
    if len(network.shapes[list(network.blocks)[-1]]) != 1:
        raise Refused("algo=sigprop matches whole samples with classes; this arch= has an output for each token "
                      f"(block {list(network.blocks)[-1]} gives {network.shapes[list(network.blocks)[-1]]}); use algo=local")
    if task.symbols and signal not in ("both", "fixed_both"):
        raise Refused(f"algo=sigprop with algo.signal={signal} sends numbers through block {hidden[0]} in place of the label, which takes symbols: "
                      "use algo.signal=both or fixed_both")
    if signal == "digits" and len(task.in_shape) != 3:
        raise Refused(f"algo=sigprop with algo.signal=digits draws labels as images; samples have shape {task.in_shape}: use algo.signal=label")
    if loss == "direct" and stream != "classes":
        raise Refused("algo=sigprop with algo.loss=direct takes one target a class: set algo.stream=classes, or algo.loss=labels")
    for knob, names in (("fixed", fixed), ("passed", passed)):
        if unknown := set(names) - set(hidden):
            raise Refused(f"algo=sigprop with algo.{knob}={names}: no hidden block {min(unknown)}; there are: {', '.join(hidden)}")
    if passed and (set(passed) != set(hidden[-len(passed):]) or len(passed) == len(hidden) or set(passed) & set(fixed)):
        raise Refused(f"algo=sigprop with algo.passed={passed}: only blocks right below the head can learn with it, not all of the hidden ones "
                      f"({', '.join(hidden)}), and none that algo.fixed={fixed} names")
