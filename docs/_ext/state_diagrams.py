"""Draws the state diagrams of the design page from the transition tables themselves.

A table maps (state, event) to the next state. In the drawing each state is a column and each
transition an arrow on a row of its own, so that any table can be drawn without a layout engine and
no label ever meets another. It is plain SVG in the page's own text colour.

In a page::

    ```{state-diagram} flame_dask.core.transitions:RUNNER
    What a screen reader says, and the caption.
    ```
"""

from __future__ import annotations

import html
import importlib
import inspect
from collections.abc import Mapping

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

Table = Mapping[tuple[str, str], str]

LETTER = 7.2  # the width to reckon with for a letter of 13 pixels, so that no label is cut
BOX = 30  # height of a state's box
ROW = 32  # height of a transition's row
MARGIN = 8
HEAD = 9  # length of an arrow's head


def states(table: Table) -> list[str]:
    """Return the states in the order of the table, those that nothing leaves at the end."""
    left = [str(state) for state, _ in table]
    reached = [str(state) for state in table.values()]
    return list(dict.fromkeys(left + reached))


def draw(table: Table, title: str) -> str:
    """Return the table as an SVG element."""
    columns = states(table)
    rows = [(str(source), str(event), str(target)) for (source, event), target in table.items()]
    longest = max(len(word) for word in [*columns, *(event for _, event, _ in rows)])
    pitch = round(longest * LETTER + 2 * HEAD + 24)
    centre = {state: MARGIN + pitch / 2 + pitch * i for i, state in enumerate(columns)}
    width = 2 * MARGIN + pitch * len(columns)
    height = 2 * MARGIN + BOX + ROW * len(rows) + ROW / 2
    final = set(columns) - {source for source, _, _ in rows}

    parts = [
        f'<svg class="state-diagram" role="img" viewBox="0 0 {width:g} {height:g}" '
        f'style="width:100%;max-width:{width:g}px;height:auto" font-size="13" '
        f'font-family="system-ui,sans-serif" fill="none" stroke="currentColor">',
        f"<title>{html.escape(title)}</title>",
    ]
    for state, x in centre.items():
        parts += _state(state, x, pitch - 16, height - MARGIN, final=state in final)
    for i, (source, event, target) in enumerate(rows):
        y = MARGIN + BOX + ROW * (i + 1)
        parts += _arrow(event, centre[source], centre[target], y)
    parts.append("</svg>")
    return "".join(parts)


def _state(name: str, x: float, width: float, bottom: float, *, final: bool) -> list[str]:
    left = x - width / 2
    outline = [
        f'<rect x="{left + d:g}" y="{MARGIN + d}" width="{width - 2 * d:g}" height="{BOX - 2 * d}" '
        f'rx="{8 - d}"/>'
        for d in ((0, 3) if final else (0,))
    ]
    return [
        *outline,
        _text(name, x, MARGIN + BOX / 2 + 5, weight="600"),
        f'<line x1="{x:g}" y1="{MARGIN + BOX}" x2="{x:g}" y2="{bottom:g}" stroke-opacity="0.3"/>',
    ]


def _arrow(event: str, start: float, end: float, y: float) -> list[str]:
    dot = f'<circle cx="{start:g}" cy="{y:g}" r="3.5" fill="currentColor"/>'
    if start == end:  # a transition that stays where it is: a loop beside its column
        reach = start + 22
        path = f'<path d="M{start:g} {y - 8:g}H{reach:g}V{y:g}H{start + HEAD:g}"/>'
        text = _text(event, reach + 6, y, anchor="start")
        return [path, _head(start, y, towards=-1), text]
    towards = 1 if end > start else -1
    line = f'<line x1="{start:g}" y1="{y:g}" x2="{end - towards * HEAD:g}" y2="{y:g}"/>'
    # Beside the arrow's own start, where no other column's line crosses it.
    label = _text(event, start + towards * (HEAD + 3), y - 5, anchor=_ANCHOR[towards])
    return [dot, line, _head(end, y, towards=towards), label]


_ANCHOR = {1: "start", -1: "end"}


def _head(x: float, y: float, *, towards: int) -> str:
    back = x - towards * HEAD
    return (
        f'<polygon points="{x:g},{y:g} {back:g},{y - 4:g} {back:g},{y + 4:g}" fill="currentColor"/>'
    )


def _text(text: str, x: float, y: float, *, anchor: str = "middle", weight: str = "400") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-weight="{weight}" '
        f'fill="currentColor" stroke="none">{html.escape(text)}</text>'
    )


class StateDiagram(SphinxDirective):
    """``state-diagram``: its argument is ``module:TABLE``, its content the caption."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        """Return the figure."""
        module_name, _, attribute = self.arguments[0].partition(":")
        module = importlib.import_module(module_name)
        self.env.note_dependency(inspect.getfile(module))
        text, messages = self.parse_inline(" ".join(self.content), lineno=self.content_offset)
        caption = nodes.caption("", "", *text)
        drawing = draw(getattr(module, attribute), caption.astext())
        return [nodes.figure("", nodes.raw("", drawing, format="html"), caption), *messages]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("state-diagram", StateDiagram)
    return {"parallel_read_safe": True}
