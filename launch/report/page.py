"""A report as one page for a browser: one file, from phone to desktop, on light and dark paper, without a network."""

from __future__ import annotations

import base64
import html
from pathlib import Path

from launch.report.content import Content
from launch.report.plots.canvas import DARK, LIGHT, Ink, Picture
from launch.report.tables import Table

STYLE = Path(__file__).with_name("page.css")


def as_html(content: Content) -> str:
    """Style and plots are in it; its policy lets a browser fetch nothing."""
    names = [arm.name for arm in content.comparison.arms]
    first, *others = content.tables
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
            "style-src 'unsafe-inline'\">",
            '<link rel="icon" href="data:,">',  # or a browser would ask for one
            f"<title>{html.escape(', '.join(names))}</title><style>{_colours()}{STYLE.read_text()}</style></head>",
            f"<body><main><h1>{html.escape(' · '.join(names))}</h1>",
            _list("notes", content.comparison.notes),
            _section(first, names),
            f'<section class="plots">{"".join(map(_figure, content.pictures))}</section>',
            *(_section(table, names) for table in others if not table.folded),
            f"<section><h2>What is missing, and why</h2>{_list('missing', content.missing)}</section>"
            if content.missing
            else "",
            *(_folded(table, names) for table in others if table.folded),
            "</main></body></html>",
            "",
        ]
    )


def _colours() -> str:
    """The papers and arms of the plots."""

    def of(ink: Ink) -> str:
        arms = "".join(f"--arm-{index}:{colour};" for index, colour in enumerate(ink.arms))
        return f":root{{--paper:{ink.paper};--ink:{ink.text};--muted:{ink.muted};{arms}}}"

    return f"{of(LIGHT)}@media (prefers-color-scheme: dark){{{of(DARK)}}}"


def _figure(picture: Picture) -> str:
    light, dark = (f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in (picture.light, picture.dark))
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{html.escape(picture.alt)}" src="{light}"></picture>'
        f"<figcaption>{html.escape(picture.plot.caption)}</figcaption></figure>"
    )


def _section(table: Table, arms: list[str]) -> str:
    return f"<section><h2>{html.escape(table.title)}</h2>{_table(table, arms)}</section>"


def _folded(table: Table, arms: list[str]) -> str:
    return f"<details><summary>{html.escape(table.title)}</summary>{_table(table, arms)}</details>"


def _table(table: Table, arms: list[str]) -> str:
    if table.kind == "cards":
        return f'<div class="cards">{"".join(_card(table.head, row, table.literal, arms) for row in table.body)}</div>'
    top = "".join(f'<th scope="col">{_named(cell, arms)}</th>' for cell in table.head)
    body = "".join(
        "<tr>"
        + f'<th scope="row">{_cell(first, table.head[0] in table.literal)}</th>'
        + "".join(
            f"<td>{_cell(cell, head in table.literal)}</td>" for head, cell in zip(table.head[1:], rest, strict=True)
        )
        + "</tr>"
        for first, *rest in table.body
    )
    return (
        # a wide table scrolls by itself, also by keyboard, and the page does not
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(table.title)}">'
        f'<table class="{table.kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _card(head: list[str], row: list[str], literal: tuple[str, ...], arms: list[str]) -> str:
    pairs = "".join(
        f"<dt>{html.escape(key)}</dt><dd>{_cell(cell, key in literal)}</dd>"
        for key, cell in zip(head[1:], row[1:], strict=True)
    )
    return f"<article><h3>{_named(row[0], arms)}</h3><dl>{pairs}</dl></article>"


def _named(text: str, arms: list[str]) -> str:
    """With the colour of the arm, if it is the name of one."""
    if text not in arms:
        return html.escape(text)
    colour = arms.index(text) % len(LIGHT.arms)
    return f'<span class="dot" style="background:var(--arm-{colour})"></span>{html.escape(text)}'


def _cell(text: str, literal: bool) -> str:
    return f"<code>{html.escape(text)}</code>" if literal else html.escape(text)


def _list(kind: str, sentences: list[str]) -> str:
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    return f'<ul class="{kind}">{items}</ul>' if items else ""
