"""Loss curves of a training folder as one PNG.

    python -m causal_forcing.training.curves OUTPUT.png

One panel a stage, logarithmic, with a running median; drawn with Pillow, so that nothing else is needed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from causal_forcing.training.loop import DEFAULT_ROOT, read_log

STAGES = ("vae", "lightvae", "ar", "first-frames", "bidirectional", "guided", "cd", "cd-ar", "cd-bidirectional")
PANEL = (360, 220)
MARGIN = 28
SMOOTHING = 25


def draw_panel(title: str, losses: Sequence[float]) -> Image.Image:
    """Return one panel: every loss as a dot, the running median as a line, on a logarithmic scale."""
    image = Image.new("RGB", PANEL, "white")
    pen = ImageDraw.Draw(image)
    values = np.log10(np.maximum(np.asarray(losses), 1e-8))
    low, high = float(values.min()), float(values.max()) + 1e-6
    width, height = PANEL[0] - 2 * MARGIN, PANEL[1] - 2 * MARGIN

    def place(step: int, value: float) -> tuple[float, float]:
        return MARGIN + width * step / max(1, len(values) - 1), MARGIN + height * (high - value) / (high - low)

    for step, value in enumerate(values):
        pen.point(place(step, float(value)), fill=(170, 190, 220))
    smooth = [float(np.median(values[max(0, step - SMOOTHING) : step + 1])) for step in range(len(values))]
    pen.line([place(step, value) for step, value in enumerate(smooth)], fill=(30, 60, 160), width=2)
    pen.text((MARGIN, 6), f"{title}: {len(values)} steps, loss {math.pow(10, smooth[-1]):.4f}", fill="black")
    pen.text((2, MARGIN), f"{math.pow(10, high):.2g}", fill="black")
    pen.text((2, PANEL[1] - MARGIN), f"{math.pow(10, low):.2g}", fill="black")
    return image


def draw(root: Path, output: Path) -> int:
    """Write the panels of all stages that have a log; return how many there were."""
    logs = [(stage, root / stage) for stage in STAGES if (root / stage / "log.jsonl").exists()]
    panels = [draw_panel(stage, [record["loss"] for record in read_log(folder)]) for stage, folder in logs]
    if panels:
        sheet = Image.new("RGB", (PANEL[0] * min(3, len(panels)), PANEL[1] * -(-len(panels) // 3)), "white")
        for index, panel in enumerate(panels):
            sheet.paste(panel, (PANEL[0] * (index % 3), PANEL[1] * (index // 3)))
        output.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(output)
    return len(panels)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="PNG to write")
    parser.add_argument("--root", type=Path, default=DEFAULT_ROOT, help="folder of checkpoints and logs")
    arguments = parser.parse_args()
    print(f"drew {draw(arguments.root, arguments.output)} stages")


if __name__ == "__main__":
    main()
