"""A learning rule of lbp on your own network, in your own training loop.

    python examples/own_loop.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import lbp

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x = torch.tensor(images / 16, dtype=torch.float32)
y = torch.tensor(labels)

mine = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 10))
network = lbp.Network.of(mine)
task = lbp.Task(kind="classification", in_shape=(64,), outputs=10, classes=10)
rule = lbp.rule("dfa", network, task)

# Any torch optimizers, one for each group of parameters; lbp.Apply averages, guards and steps.
optimizers = {name: torch.optim.Adam(parameters, lr=1e-3) for name, parameters in rule.groups().items()}
apply = lbp.Apply(rule.groups(), optimizers)

for epoch in range(20):
    for rows in torch.randperm(1500).split(50):
        apply.count = len(rows)
        learned = rule.learn(x[rows], y[rows], apply)
        apply.finish(learned.loss)

with torch.no_grad():
    accuracy = (mine(x[1500:]).argmax(1) == y[1500:]).float().mean()
print(f"test accuracy {accuracy:.3f}")
