"""Learning beyond backprop: experiments with learning rules other than backpropagation.

From Python: `lbp.run("algo=dfa", "dataset=digits")`; or `lbp.rule("dfa", network, task)` in a training loop of one's own.
"""

__version__ = "0.1.0"

_PUBLIC = {
    "run": "lbp.api", "rule": "lbp.api", "Network": "lbp.archs.network", "Task": "lbp.datasets.task",
    "Apply": "lbp.training.apply", "Result": "lbp.launch.one",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    # Lazily, because the command line must answer without importing torch.
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lbp' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)
