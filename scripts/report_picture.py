"""The picture of a report, as Chromium shows it: the sweep of docs/report.md on the full MNIST, `lbp report` of it, its page as a PNG.

    LBP_DATA=... python scripts/report_picture.py docs/plots/report.png

About seven minutes on one core; the runs stay under outputs/. With --page FILE only the picture of a page that is there already.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

from lbp.cli import main as lbp
from lbp.report.runs import within

SWEEP = ["dataset=mnist", "algo=bp,fa,dfa,kp,local,sigprop,ldrl,cdni,shallow", "seed=0,1,2", "trainer.epochs=3", "metrics.every=25",
         "trainer.threads=1", "logger.wandb.mode=disabled"]
WIDTH, TALL = 1440, 9000    # taller than the page
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--hide-scrollbars"]


def chromium(page: Path, *flags: str, dark: bool = False) -> str:
    """What Chromium, with a profile of its own, writes to stdout about the page."""
    with tempfile.TemporaryDirectory() as profile:
        scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
        return subprocess.run(["chromium", *QUIET, f"--user-data-dir={profile}", *scheme, *flags, page.absolute().as_uri()],
                              check=True, capture_output=True, text=True, timeout=120).stdout


def picture(page: Path, file: Path, width: int, height: int, dark: bool = False) -> Image.Image:
    """The page's uppermost `height` pixels at this width of the window, also written to the file."""
    chromium(page, f"--window-size={width},{height}", f"--screenshot={file.absolute()}", dark=dark)
    return Image.open(file).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--page", type=Path)
    args = parser.parse_args()
    page = args.page
    if not page:
        if code := lbp(["train", "-m", *SWEEP]):
            raise SystemExit(code)
        sweep = within(Path("outputs"))[-1].parent
        if code := lbp(["report", str(sweep)]):
            raise SystemExit(code)
        page = sweep / "report.html"
    image = picture(page, args.file, WIDTH, TALL)
    bottom = ImageChops.difference(image, Image.new("RGB", image.size, image.getpixel((0, TALL - 1)))).getbbox()[3]
    image.crop((0, 0, WIDTH, bottom + 16)).quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(args.file, optimize=True)


if __name__ == "__main__":
    main()
