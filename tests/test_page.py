"""The page of `lbp report`: what it says, and how it looks in a browser."""

import html
import importlib.util
import json
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lbp import cli
from lbp.report import compare, page, plots, runs
from test_report import ROOT, make

pytestmark = pytest.mark.usefixtures("elsewhere")

STEPS = (1, 100, 200, 300)


def measured(folder, values, layers=("fc1", "head"), steps=STEPS, **more):
    """Writes metrics.jsonl: at each step a loss and what is measured of each layer, `values(step, number of the layer)`."""
    lines = []
    for step in steps:
        of = {layer: values(step, i) for i, layer in enumerate(layers)}
        lines.append({"step": step, "epoch": 1, "split": "train", "phase": "train", "loss": 2 / step, "layers": of, "total": {}} | more)
        lines.append({"step": step, "epoch": 1, "split": "val", "loss": 2 / step, "accuracy": 1 - 0.9 / step})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def curves(*words):
    found = compare.compare([runs.read(run) for run in runs.find(list(words))])
    return [page._curves(row, len(found.rows)) for row in found.rows]


def written(*argv):
    assert cli.main(["report", "--output", "report.html", *argv]) == 0
    return Path("report.html").read_text()


# ---- what is drawn

def test_seeds_are_one_curve_and_what_is_not_there_is_no_zero():
    angles = {0: (90, 60, None, 30), 1: (80, 40, 20, float("nan")), 2: (70, 80, 10, 10**400)}
    for seed, values in angles.items():
        measured(make(f"10150{seed}-a", seed=seed), lambda step, _, values=values: {"alignment_deg": values[STEPS.index(step)], "rank": None})
    of, = curves()
    curve = of["train", "fc1", "alignment_deg"]
    assert curve == ([1, 100, 200, 300], [80, 60, 15, 30], [70, 40, 10, 30], [90, 80, 20, 30])
    assert ("train", "fc1", "rank") not in of and of["val", "", "accuracy"].y[-1] == pytest.approx(0.997)


def test_what_a_damaged_run_has_is_drawn_where_there_is_nothing_else():
    folder = make("101500-a")
    measured(folder, lambda step, _: {"alignment_deg": step})
    (folder / "metrics.jsonl").write_text("[1]\n" + (folder / "metrics.jsonl").read_text()[:-30] + '\n{"split": "val", "step": "x", "loss": 1}\n\0\n')
    of, = curves()
    assert of["train", "head", "alignment_deg"].y == [1, 100, 200, 300] and of["val", "", "loss"].x == [1, 100, 200]
    whole = make("101501-a", seed=1)
    measured(whole, lambda step, _: {"alignment_deg": 5})
    of, = curves()
    assert of["train", "head", "alignment_deg"].y == [5, 5, 5, 5]
    assert f"<code>{folder}</code></td><td>damaged</td>" in written()


def test_long_curves_are_means_of_neighbours():
    measured(make("101500-a"), lambda step, _: {"alignment_deg": step % 2, "grad_norm": step} if step != 7 else {}, steps=range(1, 1001))
    of, = curves()
    for name, mean in (("alignment_deg", 0.5), ("grad_norm", 500.5)):
        curve = of["train", "fc1", name]
        assert len(curve.x) == page.POINTS and sum(curve.y) / len(curve.y) == pytest.approx(mean, abs=0.01)
    assert curve.x[0] == 3 and (curve.low[0], curve.y[0], curve.high[0]) == (3, 3, 3)
    measured(make("101501-b", "bp"), lambda step, _: {"grad_norm": 1}, [f"fc{i}" for i in range(99)], range(1, 301))
    for words, points in ((["*-b"], 150), (["*-a", "*-b"], 100)):    # more curves, fewer points of each
        of = next(of for of in curves(*words) if ("train", "fc98", "grad_norm") in of)
        assert max(len(curve.x) for curve in of.values()) == points


def test_what_an_earlier_phase_is_taught_by_is_not_the_loss_of_the_task():
    folder = make("101500-a")
    measured(folder, lambda *_: {})
    lines = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 0, "epoch": 1, "split": "train", "phase": "inverses", "loss": 1000.0}) + "\n" + lines)
    of, = curves()
    assert max(of["train", "", "loss"].y) == 2 and of["train", "", "loss of phase inverses"].y == [1000]
    assert re.search(r"<details>\s*<summary><h2>Earlier phases", written())


def test_a_rule_looks_the_same_in_all_plots_and_like_no_other():
    for i, algo in enumerate(("bp", "fa", "dfa", "kp", "local", "sigprop", "ldrl", "cdni", "shallow")):
        for lr in (0.1, 0.2):
            measured(make(f"1015{i}{lr}-{algo}", algo, optimizer__lr=lr), lambda step, _, i=i: {"alignment_deg": 10 * i, "grad_norm": 1 + i})
    text = written()
    looks = {}
    for sample, label in re.findall(r'<li><svg class="sample"[^>]*><path[^>]*style="([^"]*)"[^>]*/></svg>([^<]*)</li>', text):
        looks.setdefault(label, set()).add(sample)
    assert len(looks) == 18 and all(len(styles) == 1 for styles in looks.values())
    assert len({style for styles in looks.values() for style in styles}) == 18
    colours = {label: re.search(r"stroke: ([^;]*)", next(iter(styles)))[1] for label, styles in looks.items()}
    assert len(set(colours.values())) == 9 and colours["dfa optimizer.lr=0.1"] == colours["dfa optimizer.lr=0.2"]
    panels = re.findall(r"<figure>.*?</figure>", text)
    for colour in set(colours.values()):
        assert all(f"stroke: {colour}" in panel for panel in panels), colour


def test_so_many_rows_as_can_be_told_apart_are_drawn():
    for i in range(40):
        make(f"10{i:04}-a", accuracy=i / 40, optimizer__lr=i)
    make("200000-shallow", "shallow", accuracy=0)
    found = compare.compare([runs.read(run) for run in runs.find([])])
    drawn = page._drawn(found.rows)
    assert len(drawn) == len({look[1:] for look in page._looks(drawn, found)}) == page.DRAWN
    assert [row.mean for row in drawn] == sorted((row.mean for row in drawn), reverse=True) and drawn[0].mean == 39 / 40 and drawn[-1].mean == 0
    assert "17 of the 41 rows" in written()


def test_many_layers_are_rows_of_colours():
    measured(make("101500-a"), lambda step, i: {"alignment_deg": i} | ({"local_loss": 1 / step} if i < 2 else {}), [f"fc{i}" for i in range(50)])
    sections = dict(re.findall(r"<h2>([^<]*)</h2>(.*?)</section>", written(), re.S))
    assert sections["Alignment"].count("<image") == 2 and "data:image/png" in sections["Alignment"]    # and the scale beside it
    assert ">fc0</text>" in sections["Alignment"] and "fc23 23, and 26 more" not in sections["Alignment"]
    assert "<image" not in sections["Local loss"] and sections["Local loss"].count("<li>") == 2


@pytest.mark.parametrize("values, name, log", [((1, 5), "loss", False), ((1, 50), "loss", True), ((0, 1e-9, 1), "grad_norm", True), ((-1, 50), "loss", False),
                                               ((0, 0), "loss", False), ((1e-300, 9e199), "loss", True), ((3, 3), "loss", False), ((0.01, 1), "local_accuracy", False), ((1, 170), "alignment_deg", False)])
def test_axes_hold_all_there_is(values, name, log):
    line = plots.Line("a", [0, 5, 9][: len(values)], values, values, values, "red")
    scale = plots.scale([line], name)
    assert scale.log == log and scale.y[0] < scale.y[1] and scale.y[1] >= max(values) and (log or scale.y[0] <= min(values))
    drawn = re.search(r'd="([^"]*)" style="[^"]*stroke: red', plots.panel([line], "<a> & b", scale))[1]
    assert all(0 <= float(n) <= 250 for n in re.findall(r"-?\d+\.?\d*", drawn))
    assert plots.panel([line], "<a> & b", scale).count("<title>&lt;a&gt; &amp; b</title>") == 1


# ---- what is said

def test_what_is_written_where(capsys, monkeypatch):
    trials = [make(f"101700-sweep-cccccc/{i}-seed-{i}", seed=i) for i in (1, 2)]
    one = make("101500-dfa-digits-s0-aaaaaa")
    for words, place in (([str(one)], one), ([str(trials[0].parent)], trials[0].parent), (["last"], trials[1]), ([], Path())):
        assert cli.main(["report", *words]) == 0
        assert capsys.readouterr().out == f"report: {place / 'report.html'}\n" and (place / "report.html").read_text().startswith("<!doctype html>")
        assert cli.main(["report", *words]) == 0    # our own is written again
        capsys.readouterr()
    named = [make(f"study/{i}", seed=i) for i in (1, 2)][0].parent      # by run.dir
    (named / "sweep.json").touch()
    assert cli.main(["report", str(named)]) == 0 and capsys.readouterr().out == f"report: {named / 'report.html'}\n"
    Path("report.html").write_text("mine")
    assert cli.main(["report"]) == 2 and "no page of lbp" in capsys.readouterr().err and Path("report.html").read_text() == "mine"
    assert cli.main(["report", "--output", "other.html"]) == 0 and cli.main(["report", "--output", "no/where.html"]) == 2
    capsys.readouterr()
    assert cli.main(["report", "--output", "-"]) == 0 and capsys.readouterr().out.endswith("</html>\n")
    assert cli.main(["report", "nothing"]) == cli.main(["report", "--by", "algp"]) == cli.main(["report", "--metric", "x"]) == 2
    assert "did you mean algo" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["report", "--output", "third.html"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err and not Path("third.html").exists()
    assert cli.main(["compare", "--html", str(named / "sweep.json")]) == 2 and "no page of lbp" in capsys.readouterr().err
    assert cli.main(["compare", "--html", "third.html"]) == 0 and "<svg" not in Path("third.html").read_text()


def test_the_table_the_controls_and_what_differs():
    for seed, accuracy in ((0, 0.5), (1, 0.7)):
        measured(make(f"10150{seed}-dfa", seed=seed, accuracy=accuracy, run__name="<script>alert(1)</script>"), lambda *_: {})
        make(f"10151{seed}-bp", "bp", seed=seed, accuracy=0.9, optimizer__lr=0.25)
        make(f"10152{seed}-shallow", "shallow", seed=seed, accuracy=0.3)
    gone = make("101530-lost", status="failed")
    (gone / "log.txt").write_text("ValueError: <b>\n")
    text = written()
    plain = html.unescape(re.sub(r"<svg.*?</svg>|<[^>]*>", " ", text))
    assert re.search(r"peak MB.*dfa\s+2\.00\s+1,000\s+500", plain, re.S)
    assert "0.6000 ± 0.1414 (2)" in plain and "+30.0 points" in plain and "over shallow" in plain
    assert re.search(r"optimizer\.lr\s+0\.25\s+0\.001\s+0\.001", plain)
    assert "name: <script>alert(1)</script>" in plain and "ValueError: <b>" in plain
    assert not re.search(r"<script|<link|<iframe|(src|href)=\"(?!data:)|https?://", text)


def test_a_line_that_is_no_measurement_is_passed_over():
    folder = make("101500-dfa-digits-s0-aaaaaa")
    measured(folder, lambda step, i: {"bp_angle": 60.0 - i})
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "split": ["a"], "layers": {}}\n{"step": [1], "split": "val"}\n')
    assert "bp_angle" in str(curves(str(folder)))


def test_a_page_of_nothing_but_damage():
    folder = make("101500-a")
    for file in folder.iterdir():
        file.write_text("\0")
    text = written()
    assert "No run says what it is" in text and str(folder) in text


# ---- how it looks

CHROMIUM = shutil.which("chromium")
WIDTHS = (390, 800, 1400)
# Of each width: how wide the page becomes, what sticks out of it beside what scrolls by itself, labels that leave their figure, the paper.
LOOK = """
window.onload = () => { document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {
  const page = frame.contentDocument, root = page.documentElement, out = [], lost = []
  page.querySelectorAll("details").forEach(part => part.open = true)
  const wide = root.clientWidth
  for (const part of page.body.querySelectorAll("*")) {
    const box = part.getBoundingClientRect()
    if (box.width && !part.closest(".scroll table, pre") && (box.left < -0.5 || box.right > wide + 0.5)) out.push(part.outerHTML.slice(0, 80))
  }
  for (const part of page.querySelectorAll("figure text")) {
    const box = part.getBoundingClientRect(), figure = part.closest("figure").getBoundingClientRect()
    if (box.left < figure.left - 8 || box.right > figure.right + 8 || box.top < figure.top || box.bottom > figure.bottom + 2) lost.push(part.textContent)
  }
  return [wide, root.scrollWidth, out, lost, page.querySelectorAll("figure text").length, getComputedStyle(page.body).backgroundColor]
})) }
"""


@pytest.fixture
def browser():
    if not CHROMIUM:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    spec = importlib.util.spec_from_file_location("report_picture", ROOT / "scripts/report_picture.py")
    spec.loader.exec_module(script := importlib.util.module_from_spec(spec))
    return script


def looked_at(browser, pages, dark):
    """What LOOK finds of the pages, each at all of the widths."""
    frames = "".join(f'<iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{html.escape(text)}"></iframe>' for text in pages for width in WIDTHS)
    wrapper = Path(f"wrapper-{dark}.html")
    wrapper.write_text(f'<!doctype html><meta name="color-scheme" content="light dark"><script>{LOOK}</script>{frames}')
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", browser.chromium(wrapper, "--dump-dom", dark=dark), re.S)[1]))


def test_in_a_browser(browser):
    for i, algo in enumerate(("bp", "dfa", "shallow")):
        for seed in (0, 1):
            folder = make(f"1015{i}{seed}-{algo}-with-a-name-that-is-longer-than-the-screen-of-a-phone-and-has-no-spaces", algo, seed=seed, optimizer__lr=1e-6 * (i + 1),
                          arch__widths=[1000] * 30)
            measured(folder, lambda step, layer, i=i, seed=seed: {"alignment_deg": 30 * i + layer + seed, "grad_norm": 1.5e-7 * 10**layer / (i + 1), "local_loss": -step},
                     ("fc1", "a_layer_with_a_name_of_more_than_forty_letters", "head"), (1, 1_000_000, 2_000_000))
    make("101600-damaged", seed=5)
    Path("outputs/2026-11-21/101600-damaged/summary.json").write_text("{" + "x" * 300)
    text = written()
    many = make("101700-deep", "dfa", seed=7)
    measured(many, lambda step, layer: {"alignment_deg": layer, "grad_norm": 10.0**-layer}, [f"encoder_block_{i}" for i in range(50)])
    deep = written(str(many))
    Path("page.html").write_text(text)
    shots = ((390, True), (1400, False))
    with ThreadPoolExecutor(2) as pool:
        looks = list(pool.map(lambda dark: looked_at(browser, (text, deep), dark), (False, True)))
        taken = list(pool.map(lambda shot: browser.picture(Path("page.html"), Path(f"{shot[0]}.png"), shot[0], 1500, shot[1]), shots))
    for dark, found in enumerate(looks):
        assert [wide for wide, *_ in found] == 2 * list(WIDTHS)
        for wide, scrolled, out, lost, labels, paper in found:
            assert scrolled == wide and out == [] and lost == [] and labels > 30, (wide, scrolled, out, lost)
            assert paper == ("rgb(21, 24, 28)" if dark else "rgb(255, 255, 255)")
    schemes = re.findall(r"--paper: (#\w+);.*?--c0: (#\w+); --c1: (#\w+)", (ROOT / "lbp/report/page.html").read_text(), re.S)
    for (width, dark), image in zip(shots, taken):
        paper, *lines = [tuple(bytes.fromhex(colour[1:] * (2 if len(colour) == 4 else 1))) for colour in schemes[dark]]
        colours = {colour: count for count, colour in image.getcolors(1 << 24)}
        assert image.size == (width, 1500) and max(colours, key=colours.get) == paper and colours[paper] < 0.97 * width * 1500
        assert len(colours) > 200 and all(colours.get(colour, 0) > 30 for colour in lines)    # the lines are in their colours
