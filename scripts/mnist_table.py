"""The README's table: each rule on the full MNIST, mean and spread over seeds, beside its controls.

    LBP_DATA=... python scripts/mnist_table.py [--seeds 3] [RULE ...]

Prints a markdown row as soon as a rule's seeds are done. About eight minutes on two cores.
"""

import argparse
import statistics

import lbp

TANH = "arch.activation=tanh"
ROWS = {  # label: overrides beside dataset=mnist trainer.epochs=3
    "bp": ["algo=bp"],
    "dfa, tanh": ["algo=dfa", TANH],
    "dfa": ["algo=dfa"],
    "fa": ["algo=fa"],
    "usf": ["algo=usf"],
    "frsf": ["algo=frsf"],
    "brsf": ["algo=brsf"],
    "wm, after 1 epoch of mirroring": ["algo=wm"],
    "dkp": ["algo=dkp"],
    "sdfa, tanh": ["algo=sdfa"],
    "drtp, tanh, adam 3e-4": ["algo=drtp"],
    "kp, sgd 0.02, momentum 0.9, decay 5e-5": ["algo=kp"],
    "local": ["algo=local"],
    "forward_forward, 784-500-500-10, x/255, 4 epochs": [
        "algo=forward_forward", "arch.widths=[500,500]", "dataset.normalize=unit", "trainer.epochs=4"],
    "ldrl, tanh, 1 epoch of inverses, 2 epochs": ["algo=ldrl", TANH, "trainer.epochs=2"],
    "control: elm, 1,000 units": ["algo=elm", "arch.widths=[1000]"],
    "control: elm, 3,000 units": ["algo=elm", "arch.widths=[3000]"],
    "control: shallow": ["algo=shallow"],
    "control: shallow, tanh": ["algo=shallow", TANH],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rules", nargs="*", help="only the rows that begin so")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    print("| rule | test accuracy | angle to bp, hidden layers | seconds of training |\n| --- | --- | --- | --- |")
    for label, overrides in ROWS.items():
        if args.rules and not label.startswith(tuple(args.rules)):
            continue
        epochs = [] if "elm" in label or any("epochs" in o for o in overrides) else ["trainer.epochs=3"]
        runs = [lbp.run("dataset=mnist", *epochs, *overrides, f"seed={seed}", "logger.console=off").summary
                for seed in range(args.seeds)]
        accuracies = [100 * run["test_accuracy"] for run in runs]
        spread = statistics.stdev(accuracies) if len(runs) > 1 else 0.0
        angles = [[run["layers"][name].get("alignment_deg") for run in runs] for name in list(runs[0]["layers"])[:-1]] \
            if runs[0]["layers"] else []
        shown = ", ".join(f"{statistics.mean(a):.0f}°" for a in angles if None not in a) or "–"
        seconds = statistics.mean(run["train_s"] for run in runs)
        print(f"| {label} | {statistics.mean(accuracies):.2f} ± {spread:.2f} | {shown} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
