"""The tables of docs/catalogue.md, from the registries: python scripts/catalogue.py > docs/catalogue.md"""

from lbp import registry
from lbp.registry import FOLDERS

FACTS = ("weight_transport", "backward_locked", "update_locked", "labels_at_input", "needs_derivative", "batch_coupled", "closed_form")


def page() -> str:
    """Every option of lbp's own: plugins are left out."""
    lines = ["# Rules, architectures and datasets", "",
             "Made by `scripts/catalogue.py` from the sources; `lbp show GROUP=OPTION` has the knobs of each.", ""]
    lines += ["## Rules", "", "| algo | what it is | family | paper | " + " | ".join(f.replace("_", " ") for f in FACTS) + " |",
              "| --- " * (4 + len(FACTS)) + "|"]
    for name, entry, doc in options("algo"):
        facts = ["yes" if entry.facts[fact] else "" for fact in FACTS]
        lines.append(f"| `{name}` | {doc} | {entry.facts['family']} | {entry.facts['paper']} | {' | '.join(facts)} |")
    for group, title in (("arch", "Architectures"), ("dataset", "Datasets")):
        lines += ["", f"## {title}", "", f"| {group} | what it is |", "| --- | --- |"]
        lines += [f"| `{name}` | {doc} |" for name, _, doc in options(group)]
    return "\n".join(lines) + "\n"


def options(group: str):
    own = registry.roots(())[0]
    for name, path in registry.options(group).items():
        if path.is_relative_to(own.conf) and group in FOLDERS:
            option = registry.option(group, name)
            entry = registry.entry(group, option.name or name)
            yield name, entry, " ".join((option.doc or entry.doc.partition("\n")[0]).split()).replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
