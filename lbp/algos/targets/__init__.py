"""Rules that give each layer a target. `LearningMachine`, `Estimator`, and the bases of halves of one's own, from Python."""

_HOMES = {"LearningMachine": "machine", "Estimator": "estimator", "StepTheta": "halves", "StepX": "halves", "Local": "halves"}


def __getattr__(name: str):
    # Only when asked for: facts are read without importing torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
