from __future__ import annotations

import torch
from torch import Tensor, nn

from lbp.algos.rule import Facts, Learned, LearningRule
from lbp.algos.synthetic.synthesizers import closeness, dense, pull
from lbp.archs.network import Network
from lbp.archs.rnn import Last, Recurrent, Tokens
from lbp.errors import Refused


class TBPTT(LearningRule):
    """Truncated backpropagation through time, alone or with a synthetic gradient where it is cut (Jaderberg et al. 2017).

    A sequence is cut into spans of `span` tokens, each learned from the detached states that the span before ended in. With a
    `synthesizer` M, s = M(states) stands at a span's end for the gradient of all losses to come, and is backpropagated together with
    the span's own loss; after the last span nothing comes. What the span finds at the states that it began from is what M ought to
    have said there: M learns |s - g|^2, per sample, from states of all recurrent layers to their gradients. So credit crosses spans,
    as far as M has learned it, and no span waits for a later one. M that is `recurrent` keeps a state of its own from cut to cut.
    Where one answer is read at the end the last span alone has a loss. `schedule=streaming` steps after each span, as the paper does.
    Within a span this is backpropagation, through time and layers.
    """

    facts = Facts(
        family="synthetic", paper="Williams & Peng, Neural Comput. 2 (1990); Jaderberg et al., ICML 2017, arXiv 1608.05343; "
                                  "Czarnecki et al., ICML 2017, arXiv 1703.00522",
        weight_transport=True, backward_locked=True, update_locked=True)

    def __init__(self, network, task, *, span: int, synthesizer: str, hidden: int, activation: str, schedule: str):
        super().__init__(network, task)
        self.embed, self.layers = recurrent_stack(network, "tbptt" if synthesizer == "none" else "tbptt_dni")
        self.span, self.schedule = span, schedule
        self.sizes = [layer.width for layer in self.layers.values() for _ in range(layer.parts)]
        weight = network.head.weight
        self.synthesizer = None if synthesizer == "none" else Synthesizer(sum(self.sizes), synthesizer, hidden, activation).to(
            weight.device, weight.dtype)

    def groups(self):
        feedback = [] if self.synthesizer is None else list(self.synthesizer.parameters())
        return {"forward": list(self.network.parameters()), "feedback": feedback}

    def learn(self, x, y, apply):
        top, streaming = list(self.layers.values())[-1], self.schedule == "streaming"
        sound = 0 * (x.sum() + y.sum())     # nan where the batch is not finite: no span of such a batch is stepped
        x = next(iter(self.layers.values())).incoming(x)
        begun = torch.cat([part for layer in self.layers.values() for part in layer.state(len(x))], 1)
        memory = None if self.synthesizer is None else self.synthesizer.state(len(x))
        seen, said, true, outs, losses = [], [], [], [], []
        for start in range(0, x.shape[1], self.span):
            last = start + self.span >= x.shape[1]
            h, end = self.run(x[:, start : start + self.span], begun)
            roots, signals = [], []
            if self.task.sequence or last:
                outs.append(self.network.head(top.read(h)))
                asked = y[:, start : start + self.span] if self.task.sequence else y
                losses.append(self.task.loss(outs[-1], asked).view(len(x), -1))
                roots, signals = [losses[-1].sum()], [None]
            if self.synthesizer is not None and not last:
                seen.append((end.detach(), memory))
                with torch.no_grad():
                    s, memory = self.synthesizer(*seen[-1])
                said.append(s)
                roots, signals = [*roots, end], [*signals, s.to(end.dtype)]
            if roots:
                torch.autograd.backward(roots, signals)
            if begun.requires_grad:
                true.append(begun.grad)
                if streaming:
                    pull(self.synthesizer(*seen[len(true) - 1])[0], true[-1])
            begun = end.detach().requires_grad_(self.synthesizer is not None)
            if streaming:
                for p in self.network.head.parameters() if roots else ():
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad      # not asked here: each step is of all parameters
                apply("forward", sound + sum(r.detach().sum() for r in roots))
                if self.synthesizer is not None:
                    apply("feedback", sound)
        blocks = {}
        if true:
            if not streaming:
                states, memories = zip(*seen)
                again, _ = self.synthesizer(torch.cat(states), tuple(torch.cat(parts) for parts in zip(*memories)))
                pull(again, torch.cat(true))
            sizes = [layer.parts * layer.width for layer in self.layers.values()]
            pairs = zip(self.layers, torch.cat(said).split(sizes, 1), torch.cat(true).split(sizes, 1))
            blocks = {name: closeness(a, b, "synthetic") for name, a, b in pairs}
        out = torch.cat(outs, 1) if self.task.sequence else outs[-1]
        return Learned(out.detach(), torch.cat(losses, 1).detach().flatten(), blocks)

    def run(self, x: Tensor, begun: Tensor) -> tuple[Tensor, Tensor]:
        """(the last layer's outputs, the states of all layers side by side) after the tokens x, from such states on."""
        h, parts, end = x if self.embed is None else self.embed(x), list(begun.split(self.sizes, 1)), []
        for layer in self.layers.values():
            h, state = layer.run(h, tuple(parts[: layer.parts]))
            del parts[: layer.parts]
            end += state
        return h, torch.cat(end, 1)


class Synthesizer(nn.Module):
    """(states (N, width), memory) -> (their gradient, memory to come). `linear`; `mlp` with one hidden layer; `recurrent`: linear in the
    states and in the h of an LSTM that reads them cut by cut, whose (h, c) are the memory."""

    def __init__(self, width: int, kind: str, hidden: int, activation: str):
        super().__init__()
        self.core = Recurrent(width, hidden, "lstm") if kind == "recurrent" else None
        self.body = dense(width + hidden * (kind == "recurrent"), [hidden] if kind == "mlp" else [], width, activation, "none")

    def state(self, n: int) -> tuple[Tensor, ...]:
        return () if self.core is None else self.core.state(n)

    def forward(self, states: Tensor, memory: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self.core is not None:
            h, memory = self.core.step(states, memory)
            states = torch.cat((states, h), 1)
        return self.body(states), tuple(part.detach() for part in memory)


def recurrent_stack(network: Network, rule: str) -> tuple[nn.Module | None, dict[str, Recurrent]]:
    """(what embeds symbols, the recurrent layers). Raises Refused for any other network."""
    layers = {name: block for name, block in network.hidden.items() if isinstance(block, Recurrent)}
    top = next(reversed(layers.values()), None)
    if top is None:
        raise Refused(f"algo={rule} cuts sequences, and the network has no recurrent block; use arch=lstm, gru or rnn")
    others = [(name, block) for name, block in network.hidden.items() if name not in layers]
    first = next(iter(network.hidden.values()))
    embed = others.pop(0)[1] if isinstance(first, Tokens) else None
    if others:
        raise Refused(f"algo={rule} runs span by span, which block {others[0][0]} ({type(others[0][1]).__name__}) does not: between "
                      "symbols and head there may be recurrent layers alone; use arch=lstm, gru or rnn")
    whole = [name for name, block in layers.items() if block is not top and not isinstance(block.read, nn.Identity)
             or block is not first and not isinstance(block.incoming, nn.Identity)]
    if whole or not isinstance(top.read, (nn.Identity, Last)):
        raise Refused(f"algo={rule}: block {(whole or list(layers)[-1:])[0]} reads the whole sequence at once, which spans do not "
                      "show it; use arch=lstm, gru or rnn")
    return embed, layers
