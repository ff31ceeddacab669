"""What lbp's speed is held against: backprop on MNIST as one would write it by hand, and nothing else.

    python scripts/plain_loop.py ROOT WIDTHS EPOCHS     e.g.  data 1024,1024 2

Tensors in memory, indexed by a permutation; fused Adam; denormals flushed; the mean cross-entropy. Prints JSON.
"""

import gzip
import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def read(path: Path, offset: int) -> np.ndarray:
    data = path.read_bytes() if path.exists() else gzip.decompress(path.with_name(path.name + ".gz").read_bytes())
    return np.frombuffer(data, np.uint8, offset=offset)


def main(root: str, widths: list[int], epochs: int, batch: int = 128) -> dict:
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    raw = Path(root) / "MNIST" / "raw"
    x = torch.from_numpy(read(raw / "train-images-idx3-ubyte", 16).reshape(-1, 784)[:55000].astype(np.float32))
    x.sub_(33.3).div_(78.6)
    y = torch.from_numpy(read(raw / "train-labels-idx1-ubyte", 8)[:55000].astype(np.int64))
    sizes = [784, *widths]
    layers = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Linear(sizes[-1], 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
    began = time.perf_counter()
    for _ in range(epochs):
        order = torch.randperm(len(x))
        for start in range(0, len(x) - batch + 1, batch):
            rows = order[start:start + batch]
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
    seconds = time.perf_counter() - began
    return {"samples_per_s": epochs * (len(x) // batch) * batch / seconds,
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], [int(w) for w in sys.argv[2].split(",")], int(sys.argv[3]))))
