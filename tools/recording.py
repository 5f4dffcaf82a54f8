"""Records `rayfwd demo` to docs/demo.svg: `make recording`.

Usage: python -m tools.recording RAY

The lines are those of a real run with that `ray` command, at the times at which they came, six
times as fast. Who wants no motion, or has no CSS animations, sees all of them at once.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from pathlib import Path
from xml.sax.saxutils import escape

TARGET = Path(__file__).parents[1] / "docs" / "demo.svg"
COLUMNS = 108
LINE, LEFT, TOP = 19, 18, 46
"""Pixels."""
WIDTH = 2 * LEFT + int(COLUMNS * 7.85)
FASTER = 6.0

STYLE = """
text { font: 13px ui-monospace, "DejaVu Sans Mono", "Liberation Mono", monospace; fill: #1a1f24;
  white-space: pre; }
.window { fill: #f4f6f8; stroke: #c6ccd2; }
.step { font-weight: 700; fill: #0b5cad; }
.cut { font-weight: 700; fill: #b3141e; }
.quiet { fill: #525c66; }
.line { animation: come 1ms both; }
@keyframes come { from { opacity: 0; } to { opacity: 1; } }
@media (prefers-reduced-motion: reduce) { .line { animation: none; } }
@media (prefers-color-scheme: dark) {
  text { fill: #e8ecf0; }
  .window { fill: #1d2329; stroke: #3c464f; }
  .step { fill: #74b6ff; }
  .cut { fill: #ff8a8a; }
  .quiet { fill: #a9b4be; }
}
"""


def recorded(ray: str) -> list[tuple[float, str]]:
    """Every line of a demo, with the seconds since its beginning. Ends where the demo fails."""
    command = [str(Path(sys.executable).with_name("rayfwd")), "demo", "--ray", ray]
    began = time.monotonic()
    lines: list[tuple[float, str]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            lines.append((time.monotonic() - began, line.rstrip()))
            print(line, end="", flush=True)
    if demo.returncode:
        sys.exit(f"the demo ended with {demo.returncode}")
    return lines


def without_waiting(lines: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Without the lines that only say that it goes on."""
    return [(at, line) for at, line in lines if not line.lstrip().startswith("…")]


def drawn(lines: list[tuple[float, str]]) -> str:
    """The SVG."""
    rows = []
    y = TOP
    for at, line in [(0.0, "$ rayfwd demo"), *lines]:
        indent = " " * (len(line) - len(line.lstrip()) + 2 * line.lstrip().startswith("- "))
        for part in textwrap.wrap(line, COLUMNS, subsequent_indent=indent) or [""]:
            if part:
                style = f'style="animation-delay: {at / FASTER:.2f}s"'
                place = f'class="line {kind(line)}" x="{LEFT}" y="{y}"'
                rows.append(f"<text {place} {style}>{escape(part)}</text>")
            y += LINE
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" '
        f'height="{y}" role="img" aria-labelledby="title">\n'
        '<title id="title">A recording of rayfwd demo: a job on two machines goes on when the '
        "link between them is cut</title>"
    )
    window = f'<rect class="window" x="1" y="1" width="{WIDTH - 2}" height="{y - 2}" rx="8"/>'
    return "\n".join([head, f"<style>{STYLE}</style>", window, *rows, "</svg>\n"])


def kind(line: str) -> str:
    """The class of a line: a step, the cut, or what is said of it."""
    if "Cutting the link" in line:
        return "cut"
    if line.startswith(("[", "$", "What happened", "Next")):
        return "step"
    return "quiet" if line.startswith("  ") and not line.startswith("  - ") else "words"


if __name__ == "__main__":
    TARGET.write_text(drawn(without_waiting(recorded(sys.argv[1]))))
    print(f"written: {TARGET}")
