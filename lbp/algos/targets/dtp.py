from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lbp.algos import ops
from lbp.algos.rule import Facts, LearningRule, Learned, Rng
from lbp.algos.targets.inverses import bring_down, distances, exact, feedback_first, inverses, no_noise_in, step_feedback, teach, walk
from lbp.errors import Refused

# From outputs to the units of the label.
LINKS = {"cross_entropy": lambda out: out.softmax(-1), "bce": torch.sigmoid, "mse": lambda out: out}


class DTP(LearningRule):
    """Difference target propagation: each block is given the output that it should have had, by inverses of those above.

    Each block above the first, and the head, has a learned inverse g. Targets come down by t_{l-1} = h_{l-1} + g_l(t_l) - g_l(h_l)
    (Lee et al. 2015), without `difference` by t_{l-1} = g_l(t_l) (target propagation: Bengio 2014), and each block moves its
    output towards its target; the head receives its exact gradient.
    `top` says where targets begin. gradient: at t_L = h_L - beta dL/dh_L of the output (Meulemans et al. 2020). hidden: at the same
    step of the last hidden block, whose gradient comes through the head's own weights (Lee et al.). label: at the output in the
    label's units, probabilities p - beta (p - label), with beta 1 the label itself; the head's inverse then starts from p.
    Inverses are trained, `feedback_steps` times a batch and before that alone for `feedback_epochs`, on |g(f(x)) - x|^2 for
    x = h + noise. `loss=difference_reconstruction` sends each block's x up to the top and down again as targets come, through all
    inverses, of which it trains the last: the way back from the output learns to invert the way to it (DTP-DRL: Meulemans et al.).
    """

    facts = Facts(
        family="targets", paper="Lee et al., ECML 2015, arXiv 1412.7525; Meulemans et al., NeurIPS 2020, arXiv 2006.14331",
        weight_transport=False, backward_locked=True, update_locked=True)

    def __init__(self, network, task, *, difference: bool, loss: str, top: str, beta: float, noise: float, inverse_activation: str,
                 feedback_steps: int, feedback_epochs: int):
        super().__init__(network, task)
        self.difference, self.loss, self.top, self.beta, self.noise = difference, loss, top, beta, noise
        self.feedback_steps, self.feedback_epochs = feedback_steps, feedback_epochs
        rule = "tp" if not difference else "dtp_drl" if loss == "difference_reconstruction" else "dtp"
        self.chain = list(network.hidden if top == "hidden" else network.blocks)
        if len(self.chain) == 1:
            raise Refused(f"algo={rule} with algo.top=hidden: above block {self.chain[0]} is only the head, whose own weights "
                          "bring the target down, so no inverse is left to learn; use algo.top=gradient, or more than one hidden "
                          "block (arch.widths)")
        self.link = task.loss_name if top == "label" else "mse"
        bias = rule != "dtp_drl" or inverse_activation == "same"
        self.inverses = inverses(network, rule, self.chain, inverse_activation, bias)
        no_noise_in(network, rule)
        self.rng = Rng()
        self.facts = replace(self.facts, weight_transport=top == "hidden")

    def groups(self):
        return {"forward": list(self.network.parameters()), "feedback": list(self.inverses.parameters())}

    def phases(self):
        return feedback_first(self)

    def learn_feedback(self, x, y, apply):
        with torch.no_grad():
            values = self._values(x, walk(self.network, x))
        return Learned(None, self._train_inverses(x, values, apply))

    def learn(self, x, y, apply):
        graphs = walk(self.network, x)
        values = self._values(x, graphs)
        for _ in range(self.feedback_steps):
            feedback_loss = self._train_inverses(x, values, apply)
        *_, head = graphs
        error, learned = ops.teach_head(self.task, graphs[head], y)
        with torch.no_grad(), ops.full_precision(x):
            step = error @ self.network.head.weight if self.top == "hidden" else error
            targets, rebuilt = bring_down(values, self.inverses, values[self.chain[-1]] - self.beta * step, self.difference)
            targets.pop(head, None)
            learned.blocks = distances(values, targets, rebuilt if self.loss == "reconstruction" else None)
        teach(graphs, values, targets, self.beta)
        if self.feedback_steps:
            learned.blocks[head] = {"feedback_loss": feedback_loss / len(x)}
        return learned

    def _values(self, x: Tensor, graphs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What targets are set beside, block by block up to the top."""
        values = exact(self.network, x, graphs)
        values = {name: values[name] for name in self.chain}
        top = self.chain[-1]
        return values if self.top == "hidden" else values | {top: LINKS[self.link](values[top])}

    def _through(self, x: Tensor, blocks: list[str]) -> Tensor:
        """x sent up through these blocks of the chain."""
        for name in blocks:
            x = self.network.blocks[name](x)
        return x if self.top == "hidden" or self.chain[-1] not in blocks else LINKS[self.link](x)

    def _train_inverses(self, x: Tensor, values: dict[str, Tensor], apply) -> Tensor:
        loss, local = 0.0, self.loss == "reconstruction"
        for i, (below, above) in enumerate(zip(self.chain, self.chain[1:])):
            h = values[below] + self.noise * self.rng.normal(values[below])
            with ops.full_precision(x):
                with torch.no_grad():
                    y = self._through(h, [above] if local else self.chain[i + 1 :])
                    if not local:
                        upper = {name: values[name] for name in self.chain[i + 1 :]}
                        y = bring_down(upper, self.inverses, y, self.difference)[0][above]
                back = self.inverses[above](y)
                if self.difference and not local:
                    back = back + values[below] - self.inverses[above](values[above])
                loss = loss + (back - h).square().sum() / (1 if local else self.noise**2)
        return step_feedback(loss, x, apply)
