"""The table of operators in export/README.md, written from the rules themselves.

``python -m fastbn_export.operator_table export/README.md`` rewrites it in place; a test holds it up to date.
"""

from __future__ import annotations

import sys
from pathlib import Path

from .registry import conditions

__all__ = ["markdown", "rewrite"]

START, END = "<!-- operators: generated -->", "<!-- end of operators -->"


def markdown() -> str:
    """The table in Markdown: operators, upstream, downstream; absorbers first, then carriers."""
    lines = []
    for kind, title in (("absorber", "Absorbers"), ("carrier", "Carriers")):
        lines += [f"### {title}", "", "| operator | pulled upstream | pushed downstream |", "|---|---|---|"]
        for names, of, upstream, downstream in conditions():
            if of == kind:
                cells = (c.replace("|", "\\|").replace("*", "\\*") for c in (names, upstream, downstream))
                lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def rewrite(text: str) -> str:
    """`text` with a fresh table between its two markers."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{markdown()}{END}{after}"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(rewrite(path.read_text(encoding="utf-8")), encoding="utf-8")
