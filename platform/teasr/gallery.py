"""Pages to look at a dataset, or at what systems made of pictures; each is one file.

Everything is inline and nothing is fetched: a content security policy in the page holds it to that.
Text that comes from a dataset is escaped.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from teasr.plots import PLOT_CSS, Overlaid, Plot, Scatter, svg


@dataclass(frozen=True)
class Card:
    """One sample.

    Attributes:
        key: its name.
        hr: encoded picture, PNG or JPEG.
        size: width and height of that picture, pixels.
        lr: encoded PNG of the same scene with smaller sides; None for a picture alone.
        note: what is shown of it, such as the cut.
        parts: lines of text under headings, such as the steps of each stage.
    """

    key: str
    hr: bytes
    size: tuple[int, int]
    lr: bytes | None = None
    note: str = ""
    parts: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Figures:
    """A table of figures.

    Attributes:
        headings: names of the columns, after the system's.
        rows: by system, a text per column; lines after its first are set small.
    """

    headings: Sequence[str]
    rows: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Scene:
    """One scene by several systems.

    Attributes:
        key: its name.
        size: width and height that every picture of it has, pixels.
        pictures: by name, encoded, PNG or JPEG.
        figures: of this scene.
        note: what is shown of it, such as the cut.
    """

    key: str
    size: tuple[int, int]
    pictures: Mapping[str, bytes]
    figures: Figures
    note: str = ""


@dataclass(frozen=True)
class Ruling:
    """A rule of a gate and what became of it.

    Attributes:
        name: the rule's.
        rule: in words.
        figure: what was found; lines after the first are set small.
        limit: what is allowed.
        passed: None when it does not count.
    """

    name: str
    rule: str
    figure: str
    limit: str
    passed: bool | None


def page(
    title: str,
    facts: Mapping[str, str],
    cards: Sequence[Card],
    plots: Mapping[str, Sequence[Plot]],
    about_plots: str,
) -> str:
    """The whole page as HTML text.

    Args:
        title: heading.
        facts: name and value of what is known of the dataset.
        cards: the samples, in order.
        plots: under their headings; empty plots are left out.
        about_plots: what the plots are of and how to read them.
    """
    pairs = any(card.lr for card in cards)
    hint = (
        "Move over a picture, or drag, to compare: LR at the left, HR at the right. "
        '<label><input type="checkbox" id="smooth"> enlarge LR smoothly</label>'
        if pairs
        else ""
    )
    shown = {name: [plot for plot in group if len(plot)] for name, group in plots.items()}
    groups = "".join(_group(name, group) for name, group in shown.items() if group)
    distributions = (
        f'<h2 id="plots">Distributions</h2><p class="hint">{_text(about_plots)}</p>{groups}'
        if groups
        else ""
    )
    links = ' · <a href="#plots">distributions</a>' if groups else ""
    body = (
        f'<h2 id="samples">Samples</h2><p class="hint">{hint}</p>'
        f'<main class="{"pairs" if pairs else "pictures"}">'
        f"{''.join(_card(card) for card in cards)}</main>{distributions}"
    )
    return _document(title, facts, f'<a href="#samples">samples</a>{links}', body)


def comparison_page(
    title: str,
    facts: Mapping[str, str],
    figures: Figures,
    about_figures: str,
    scenes: Sequence[Scene],
    about_scenes: str,
    shown: tuple[str, str],
) -> str:
    """The figures of systems, and their pictures of each scene under a slider, as HTML text.

    Args:
        title: heading.
        facts: name and value of what is known of the measurement.
        figures: of all scenes.
        about_figures, about_scenes: what is seen and how to read it.
        scenes: in order, all with pictures of the same names; none leaves the section out.
        shown: names of the pictures at the left and at the right at first; buttons choose others.
    """
    body = (
        f'<h2 id="figures">Figures</h2>{_table(figures)}<p class="hint">{_text(about_figures)}</p>'
    )
    if scenes:
        body += _scenes(scenes, about_scenes, shown)
    return _document(title, facts, "", body)


def verdict_page(
    title: str,
    passed: bool,
    sentences: Sequence[str],
    facts: Mapping[str, str],
    rulings: Sequence[Ruling],
    figures: Figures,
    about_figures: str,
    plots: Sequence[Scatter],
    about_plots: str,
    scenes: Sequence[Scene],
    about_scenes: str,
    shown: tuple[str, str],
) -> str:
    """The verdict of a gate as HTML text: the answer, the rules, the figures, dots and pictures.

    Args:
        title: heading.
        passed: the verdict.
        sentences: what it means; the first is set large.
        facts: name and value of what is known of the contest.
        rulings: in the order of the gate's rules.
        figures: means of the systems.
        about_figures, about_plots, about_scenes: what is seen and how to read it; the last one may
            say why there are no scenes.
        plots: none leaves the section out.
        scenes, shown: as of `comparison_page`.
    """
    headline, *others = sentences
    lead = (
        f'<div class="verdict {"passed" if passed else "failed"}" role="status">'
        f"<strong>{_text(headline)}</strong>{''.join(f'<p>{_text(s)}</p>' for s in others)}</div>"
    )
    rows = "".join(_ruling(ruling) for ruling in rulings)
    body = (
        '<h2 id="rules">Rules</h2><div class="table"><table class="rulings"><tr><th>rule</th>'
        f"<th>result</th><th>found</th><th>allowed</th></tr>{rows}</table></div>"
        f'<h2 id="figures">Figures</h2>{_table(figures)}<p class="hint">{_text(about_figures)}</p>'
    )
    if plots:
        dots = "".join(
            f"<figure><figcaption>{_text(plot.title)}<span>better for {plot.wins} of {len(plot)}"
            f"</span></figcaption>{svg(plot)}</figure>"
            for plot in plots
        )
        body += (
            f'<h2 id="dots">Picture by picture</h2><p class="hint">{_text(about_plots)}</p>'
            f'<div class="plots dots">{dots}</div>'
        )
    body += _scenes(scenes, about_scenes, shown)
    return _document(title, facts, "", body, lead)


def figures_page(
    title: str,
    facts: Mapping[str, str],
    figures: Figures,
    about_figures: str,
    plots: Mapping[str, Sequence[Overlaid]],
    about_plots: str,
) -> str:
    """A table of figures and the distributions behind it, as HTML text; arguments as of `page` and
    `comparison_page`."""
    body = (
        f'<h2 id="figures">Figures</h2>{_table(figures)}<p class="hint">{_text(about_figures)}</p>'
        f'<h2 id="plots">Distributions</h2><p class="hint">{_text(about_plots)}</p>'
    )
    body += "".join(_group(name, group) for name, group in plots.items())
    return _document(title, facts, "", body)


def _ruling(ruling: Ruling) -> str:
    words, kind = {
        True: ("✓ passed", "passed"),
        False: ("✗ failed", "failed"),
        None: ("– does not count", "open"),
    }[ruling.passed]
    return (
        f"<tr><th>{_text(ruling.name)}<small>{_text(ruling.rule)}</small></th>"
        f'<td class="{kind}">{words}</td>{_cell(ruling.figure)}{_cell(ruling.limit)}</tr>'
    )


def _scenes(scenes: Sequence[Scene], about: str, shown: tuple[str, str]) -> str:
    heading = f'<h2 id="pictures">Pictures</h2><p class="hint">{_text(about)}</p>'
    if not scenes:
        return heading
    return (
        f"{heading}{_choice(list(scenes[0].pictures), shown)}"
        f'<main class="scenes">{"".join(_scene(scene, shown) for scene in scenes)}</main>'
    )


def _document(title: str, facts: Mapping[str, str], links: str, body: str, lead: str = "") -> str:
    rows = "".join(f"<dt>{_text(name)}</dt><dd>{_text(facts[name])}</dd>" for name in facts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<title>{_text(title)}</title><style>{_CSS}{PLOT_CSS}</style></head><body>"
        f'<header><h1>{_text(title)}</h1><p class="links">{links}</p>{lead}<dl>{rows}</dl></header>'
        f"{body}<script>{_SCRIPT}</script></body></html>\n"
    )


def _table(figures: Figures) -> str:
    headings = "".join(f"<th>{_text(heading)}</th>" for heading in ("", *figures.headings))
    rows = "".join(
        f"<tr><th>{_text(system)}</th>{''.join(_cell(text) for text in texts)}</tr>"
        for system, texts in figures.rows.items()
    )
    return f'<div class="table"><table><tr>{headings}</tr>{rows}</table></div>'


def _cell(text: str) -> str:
    first, *others = text.splitlines() or [""]
    small = "".join(f"<small>{_text(line)}</small>" for line in others)
    return f"<td>{_text(first)}{small}</td>"


def _choice(names: Sequence[str], shown: tuple[str, str]) -> str:
    groups = ""
    for side, at_first in zip(("left", "right"), shown):
        buttons = "".join(
            f'<button data-side="{side}" value="{_text(name)}" '
            f'aria-pressed="{str(name == at_first).lower()}">{_text(name)}</button>'
            for name in names
        )
        groups += f'<span role="group" aria-label="{side}"><b>{side}</b>{buttons}</span>'
    return f'<nav class="choice">{groups}</nav>'


def _scene(scene: Scene, shown: tuple[str, str]) -> str:
    width, height = scene.size
    enlarged = max(1, 512 // max(width, height))
    key, (left, right) = _text(scene.key), shown
    images = "".join(
        _image(
            data,
            f"{key}: {_text(name)}",
            " ".join(side for side, at in (("on-left", left), ("on-right", right)) if at == name),
            name,
        )
        for name, data in scene.pictures.items()
    )
    note = f'<p class="note">{_text(scene.note)}</p>' if scene.note else ""
    return (
        f'<article class="scene"><div class="view compare stack{" large" * (enlarged > 1)}" '
        f'style="width:{width * enlarged}px;aspect-ratio:{width}/{height}">{images}'
        f'<i class="rule"></i><b class="tag left">{_text(left)}</b>'
        f'<b class="tag right">{_text(right)}</b>'
        f'<input type="range" min="0" max="100" value="50" step="any" '
        f'aria-label="share of {key} that shows the left picture"></div>'
        f'<div class="about"><h3>{key}</h3>{note}{_table(scene.figures)}</div></article>'
    )


def _card(card: Card) -> str:
    width, height = card.size
    ratio = f"aspect-ratio:{width}/{height}"
    name = _text(card.key)
    if card.lr is None:
        pictures = f'<div class="view" style="{ratio}">{_image(card.hr, name)}</div>'
    else:
        pictures = (
            f'<div class="view compare" style="{ratio}">{_image(card.hr, f"HR of {name}")}'
            f"{_image(card.lr, f'LR of {name}', 'lr')}"
            '<i class="rule"></i><b class="tag left">LR</b><b class="tag right">HR</b>'
            f'<input type="range" min="0" max="100" value="50" step="any" '
            f'aria-label="share of {name} that shows LR"></div>'
        )
    parts = "".join(_part(heading, lines) for heading, lines in card.parts.items() if lines)
    note = f'<p class="note">{_text(card.note)}</p>' if card.note else ""
    return (
        f'<article>{pictures}<div class="about"><h3>{name}</h3>{note}'
        f'<div class="recipe">{parts}</div></div></article>'
    )


def _part(heading: str, lines: Sequence[str]) -> str:
    items = "".join(f"<li>{_text(line)}</li>" for line in lines)
    return f"{f'<h4>{_text(heading)}</h4>' if heading else ''}<ol>{items}</ol>"


def _group(name: str, plots: Sequence[Plot | Overlaid]) -> str:
    figures = "".join(
        f"<figure><figcaption>{_text(plot.title)}<span>n = {len(plot)}</span>"
        f"</figcaption>{svg(plot)}</figure>"
        for plot in plots
    )
    return f'<section><h3>{_text(name)}</h3><div class="plots">{figures}</div></section>'


def _image(data: bytes, name: str, kind: str = "", system: str = "") -> str:
    media = "image/png" if data.startswith(b"\x89PNG") else "image/jpeg"
    text = base64.b64encode(data).decode()
    whose = f' data-system="{_text(system)}"' if system else ""
    return f'<img class="{kind}" alt="{name}"{whose} src="data:{media};base64,{text}">'


def _text(text: str) -> str:
    # A lone surrogate cannot be written as UTF-8.
    return html.escape(str(text).encode(errors="replace").decode())


_SCRIPT = """
for (const view of document.querySelectorAll('.compare')) {
  const range = view.querySelector('input');
  const show = () => view.style.setProperty('--at', range.value + '%');
  range.addEventListener('input', show);
  view.addEventListener('pointermove', event => {
    const box = view.getBoundingClientRect();
    range.value = 100 * (event.clientX - box.left) / box.width;
    show();
  });
}
for (const button of document.querySelectorAll('.choice button')) {
  const side = button.dataset.side;
  button.addEventListener('click', () => {
    for (const other of document.querySelectorAll(`.choice [data-side=${side}]`))
      other.setAttribute('aria-pressed', other === button);
    for (const image of document.querySelectorAll('.stack img'))
      image.classList.toggle(`on-${side}`, image.dataset.system === button.value);
    for (const tag of document.querySelectorAll(`.stack .${side}`))
      tag.textContent = button.value;
  });
}
"""

_CSS = """
:root { color-scheme: light dark; --ink: #23262b; --faint: #6d737c; --paper: #f6f6f4;
  --card: #fff; --edge: #dfe0de; --bar: #93b4d4; --bar-hover: #5c8abb; --mark: #c2410c;
  --good: #1e7a34; --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e5e7; --faint: #9aa0a8; --paper: #17191c;
  --card: #202327; --edge: #33373d; --bar: #4f7196; --bar-hover: #78a2cf; --mark: #fb923c;
  --hue0: #fb923c; --hue1: #78a2cf; --good: #7fc68b; --bad: #f58d80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 28px 24px 60px; background: var(--paper);
  color: var(--ink); font: 14px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 24px; margin: 0; } h2 { font-size: 19px; margin: 36px 0 4px; }
h3 { font-size: 14px; margin: 0; overflow-wrap: anywhere; }
h4 { font-size: 11px; margin: 8px 0 1px; color: var(--faint); font-weight: 600;
  text-transform: uppercase; letter-spacing: .05em; }
a { color: inherit; } .links { margin: 2px 0 12px; }
.links, .hint, .note { color: var(--faint); } .hint { margin: 0 0 14px; max-width: 84ch; }
.hint label { margin-left: 12px; white-space: nowrap; } .hint input { vertical-align: -2px; }
.note { margin: 0; font-size: 12px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 1px 18px; margin: 0; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
article, figure { background: var(--card); border: 1px solid var(--edge); border-radius: 8px;
  overflow: hidden; margin: 0; }
.pairs { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(540px, 1fr)); }
.pairs article { display: grid; grid-template-columns: minmax(0, 1fr) 230px; align-items: start; }
.pictures { columns: 210px; column-gap: 14px; }
.pictures article { break-inside: avoid; margin-bottom: 14px; }
.about { padding: 10px 12px 12px; } ol { margin: 0; padding: 0; list-style: none; }
.recipe { font-size: 12px; line-height: 1.42; } .recipe li { overflow-wrap: anywhere; }
.view { position: relative; background: #777; overflow: hidden; }
.view img { position: absolute; inset: 0; width: 100%; height: 100%; display: block; }
.compare { --at: 50%; cursor: ew-resize; touch-action: pan-y; }
.compare .lr { image-rendering: pixelated; clip-path: inset(0 calc(100% - var(--at)) 0 0); }
body:has(#smooth:checked) .compare .lr { image-rendering: auto; }
.rule { position: absolute; top: 0; bottom: 0; left: var(--at); width: 2px; margin-left: -1px;
  background: #fff; box-shadow: 0 0 3px #000a; pointer-events: none; }
.tag { position: absolute; bottom: 8px; padding: 0 7px; border-radius: 9px; font-size: 11px;
  background: #000a; color: #fff; pointer-events: none; }
.left { left: 8px; } .right { right: 8px; }
.compare input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0;
  cursor: ew-resize; }
.compare:focus-within { outline: 2px solid var(--bar-hover); }
.choice { position: sticky; top: 0; z-index: 3; display: flex; flex-wrap: wrap; gap: 6px 28px;
  padding: 8px 0; background: var(--paper); }
.choice b { margin-right: 8px; font-weight: 600; color: var(--faint); }
.choice button { font: inherit; color: inherit; background: var(--card); padding: 2px 11px;
  border: 1px solid var(--edge); margin: 0 -1px 0 0; cursor: pointer; }
.choice b + button { border-radius: 6px 0 0 6px; }
.choice button:last-child { border-radius: 0 6px 6px 0; }
.choice button[aria-pressed=true] { background: var(--bar); border-color: var(--bar); color: #111; }
.scenes { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 16px; }
.scene { width: min-content; min-width: min(340px, 100%); max-width: 100%; }
.scene .view { max-width: 100%; }
.stack img { visibility: hidden; } .stack .on-left, .stack .on-right { visibility: visible; }
.stack .on-left:not(.on-right) { z-index: 1; clip-path: inset(0 calc(100% - var(--at)) 0 0); }
.stack .rule, .stack .tag, .stack input { z-index: 2; } .large img { image-rendering: pixelated; }
.table { overflow-x: auto; } table { border-collapse: collapse; margin: 8px 0 10px; }
th, td { padding: 4px 14px; text-align: right; border-bottom: 1px solid var(--edge);
  font-weight: normal; vertical-align: top; font-variant-numeric: tabular-nums; }
tr:first-child th { color: var(--faint); font-size: 12px; } tr th:first-child { text-align: left;
  padding-left: 2px; white-space: nowrap; }
td small { display: block; color: var(--faint); font-size: 11px; white-space: nowrap; }
.about table { font-size: 12px; margin-bottom: 0; } .about th, .about td { padding: 2px 7px; }
.verdict { margin: 4px 0 16px; padding: 12px 16px; border-left: 6px solid var(--tone);
  background: color-mix(in srgb, var(--tone) 12%, var(--card)); border-radius: 4px; }
.verdict strong { font-size: 18px; } .verdict p { margin: 2px 0 0; }
.passed { --tone: var(--good); } .failed { --tone: var(--bad); } .open { --tone: var(--faint); }
.rulings th, .rulings td { text-align: left; }
.rulings th + td { color: var(--tone); } .rulings th + td, .rulings td:last-child {
  white-space: nowrap; }
.rulings td.failed { font-weight: 600; }
.rulings th small { display: block; color: var(--faint); font-size: 12px; white-space: normal; }
.rulings tr:not(:first-child) th { font-weight: 600; } .rulings th small { font-weight: normal; }
.dots { columns: unset; display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); }
.dots figure { margin: 0; max-width: 460px; }
section h3 { margin: 18px 0 8px; font-size: 15px; }
.plots { columns: 270px; column-gap: 12px; }
figure { padding: 9px 10px 7px; margin-bottom: 12px; break-inside: avoid; }
figcaption { display: flex; justify-content: space-between; gap: 8px; font-size: 12px;
  margin-bottom: 6px; } figcaption span { color: var(--faint); white-space: nowrap; }
@media (max-width: 640px) { .pairs { grid-template-columns: 1fr; }
  .pairs article { grid-template-columns: 1fr; } }
"""
