"""What one does with a run that is over: evaluate a checkpoint, export the network."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor, nn

from lbp.config import compose
from lbp.errors import ConfigError, out_of_resources
from lbp.launch import folder as folders
from lbp.logs.console import say
from lbp.training import checkpoint as checkpoints
from lbp.training.results import evaluate
from lbp.training.setup import Experiment, build

WHERE = tuple(f"trainer.{key}" for key in ("device", "threads", "precision", "determinism", "compile"))
LEARNED_WITH = tuple(f"dataset.{key}" for key in ("normalize", "train_size", "val_size", "augment"))


def restored(run: Path, which: str, overrides: list[str]) -> tuple[Experiment, dict]:
    """The run's objects with the weights of a checkpoint (`last` or `best`), and the checkpoint.

    `overrides` may change where and on what it runs, not the network or the rule. Raises ConfigError, DataError.
    """
    for text in overrides:
        key = text.split("=")[0].lstrip("+")
        if key in LEARNED_WITH or key.split(".")[0] != "dataset" and key not in WHERE:
            raise ConfigError(f"{text}: cannot be changed for a trained run; free are {', '.join(WHERE)}, and of the dataset all that changes "
                              "neither what was learned from nor how it is normalised")
    content = checkpoints.load(run / "checkpoints" / f"{which}.pt")
    experiment = build(compose(overrides, file=run / "config.yaml").values, begun=True)
    try:
        experiment.rule.load_state_dict(content["rule"])
    except RuntimeError as error:
        raise ConfigError(f"{run}: the weights of its {which} checkpoint do not fit this dataset: "
                          f"{str(error).splitlines()[-1].strip()}") from None
    return experiment, content


def evaluate_run(run: Path, split: str, checkpoint: str, overrides: list[str]) -> None:
    """`lbp eval`: prints loss and metrics of a checkpoint on a split."""
    experiment, content = restored(run, checkpoint, overrides)
    part = getattr(experiment.data, split)
    if part is None:
        raise ConfigError(f"--split {split}: this run has none (dataset.val_size=0); use --split test")
    found = evaluate(experiment.rule, experiment.data.task, part, experiment.environment)
    say(f"{split} of {experiment.data.name} ({len(part):,} samples), {checkpoint} checkpoint (epoch {content['state']['epoch']}): "
        + "  ".join(f"{name} {found[name]:.4f}" for name in (*experiment.data.task.metrics, "loss")))
    if experiment.values["dataset"]["normalize"] == "standard" and any(text.partition("=")[0] in ("dataset", "dataset.file") for text in overrides):
        say("normalised by the mean and deviation of its own training split, not of that which the run learned from")


class Predictor(nn.Module):
    """The rule's prediction as a module of its own."""

    def __init__(self, rule):
        super().__init__()
        self.rule = rule

    def forward(self, x: Tensor) -> Tensor:
        return self.rule.predict(x)


def export_run(run: Path, checkpoint: str, to: Path | None) -> Path:
    """`lbp export`: writes what the trained rule predicts with as a torch.export program, for any batch size.

    It loads without lbp: `torch.export.load(PATH).module()(x)`, x as the run's dataset and normalisation give it.
    """
    experiment, content = restored(run, checkpoint, ["trainer.device=cpu", "trainer.compile=false"])
    path = Path(to) if to else run / "network.pt2"
    if path.exists() and not path.is_file():
        raise ConfigError(f"--to {path}: is there already, and no file; name another")
    x = next(experiment.data.test.passes(4))[0]
    experiment.rule.eval()
    with torch.no_grad():
        program = torch.export.export(Predictor(experiment.rule), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, file := io.BytesIO())
    try:
        folders.whole(path.resolve(), file.getvalue())
    except OSError as error:
        if out_of_resources(error):
            raise
        raise ConfigError(f"--to {path}: cannot be written ({error.strerror}); name another file") from None
    values = experiment.values["dataset"]
    say(f"{path}: epoch {content['state']['epoch']}, inputs (batch, {', '.join(map(str, experiment.data.task.in_shape))}) as "
        f"dataset={experiment.data.name} dataset.normalize={values['normalize']} gives them")
    say(f"load: torch.export.load({str(path)!r}).module()")
    return path
