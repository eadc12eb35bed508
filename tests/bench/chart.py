"""Draw the README's picture from measured figures.

    python3 tests/bench/run.py --json FILE choice
    python3 tests/bench/chart.py FILE > .github/start.svg

Each bar is the median time of one way to start a fresh process, get its answer and see
it end. A warm pool is left out: it starts nothing.
"""

import json
import sys
from xml.sax.saxutils import escape

import rows
import run

WIDTH, BAR, GAP, LABELS, FIGURES = 720, 22, 10, 225, 80
TITLE = "Start a fresh Python process, get its answer, see it end (shorter is better)"
STYLE = """\
text { font: 14px sans-serif; fill: #24292f } .small { font-size: 11px; fill: #57606a }
rect { fill: #8c959f } rect.ours { fill: #2da44e }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .small { fill: #9198a1 } }"""


def draw(measured):
    bars = [each for each in measured["results"] if each["table"] == rows.CHOICE]
    bars = [each for each in bars if "warm" not in each["measured"]]
    bars.sort(key=lambda each: each["sidexec"])
    longest = max(each["sidexec"] for each in bars)
    height = 30 + len(bars) * (BAR + GAP) + 20
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}"'
        f' viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(TITLE)}</title>",
        f"<style>{STYLE}</style>",
        f'<text x="0" y="16">{escape(TITLE)}</text>',
    ]
    for number, each in enumerate(bars):
        top = 30 + number * (BAR + GAP)
        length = max(1.0, (WIDTH - LABELS - FIGURES) * each["sidexec"] / longest)
        kind = "ours" if each["measured"] == "sidexec" else "other"
        label, figure = escape(each["measured"]), run.quantity(each["sidexec"], each["unit"])
        lines += [
            f'<text x="{LABELS - 10}" y="{top + 16}" text-anchor="end">{label}</text>',
            f'<rect class="{kind}" x="{LABELS}" y="{top}" width="{length:.1f}" height="{BAR}"/>',
            f'<text x="{LABELS + length + 8:.1f}" y="{top + 16}">{figure}</text>',
        ]
    machine = escape(measured["machine"].partition(", load")[0])
    lines += [f'<text class="small" x="0" y="{height - 4}">{machine}</text>', "</svg>"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: chart.py FILE > .github/start.svg")
    with open(sys.argv[1]) as file:
        sys.stdout.write(draw(json.load(file)))
