"""The page the demo writes: one self-contained ``index.html`` beside its pictures.

A station of the demo describes its part of the page with the small types below; :func:`write_page` turns the reports
of all stations that ran into HTML. The page uses no script and no network, follows the reader's light or dark
setting, prints, and fits a telephone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path


@dataclass(frozen=True)
class Picture:
    """One image file below the page's folder; ``dark`` optionally names the version for dark pages."""

    path: str
    alt: str
    caption: str
    width: int
    height: int
    dark: str | None = None


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side under a common caption; on a narrow screen they stand below each other."""

    pictures: tuple[Picture, ...]
    caption: str = ""


@dataclass(frozen=True)
class Table:
    """A table of plain texts; columns that hold numbers are named in ``numeric``."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[int] = frozenset()
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A heading and what follows it. A string is one paragraph and may hold inline HTML written by the station."""

    heading: str
    blocks: tuple[str | Gallery | Table, ...]


@dataclass(frozen=True)
class Check:
    """A property of the results that the station verified, with the figure that was found."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class StationReport:
    """What a station of the demo found: its part of the page, and the table and checks the terminal shows."""

    name: str
    title: str
    lead: str
    sections: tuple[Section, ...]
    table: Table
    checks: tuple[Check, ...]
    seconds: float
    credits: tuple[str, ...] = field(default=())

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


def write_page(folder: Path, reports: Sequence[StationReport], *, command: str, versions: str) -> Path:
    """Write ``index.html`` into ``folder`` and return its path.

    Parameters
    ----------
    folder : Path
        Holds the pictures that the reports name with relative paths.
    reports : sequence of StationReport
        One for each station that ran, in reading order.
    command : str
        The command line that makes this page, shown in the footer.
    versions : str
        Versions and threads behind the figures, shown in the footer.
    """
    path = folder / "index.html"
    path.write_text(render_page(reports, command=command, versions=versions), encoding="utf-8")
    return path


def render_page(reports: Sequence[StationReport], *, command: str, versions: str) -> str:
    """Return the HTML of the page as one string; see :func:`write_page`."""
    title = reports[0].title if len(reports) == 1 else "Kantor on real data"
    articles = "\n".join(_article(report, alone=len(reports) == 1) for report in reports)
    sources = "\n".join(f"<li>{text}</li>" for report in reports for text in report.credits)
    # A page of one station is a short article: its title is the page's, and it needs no list of contents.
    heading = "" if len(reports) == 1 else f"<h1>{escape(title)}</h1>\n{_contents(reports)}\n"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)} · Kantor</title>
<style>{_STYLE}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the content</a>
<main id="content">
{heading}{articles}
</main>
<footer>
<h2>How this page was made</h2>
<pre tabindex="0"><code>{escape(command)}</code></pre>
<p>{escape(versions)}</p>
<h2>Pictures</h2>
<ul>
{sources}
</ul>
</footer>
</body>
</html>
"""


def _contents(reports: Sequence[StationReport]) -> str:
    links = "\n".join(f'<li><a href="#{escape(report.name)}">{escape(report.title)}</a></li>' for report in reports)
    return f'<nav aria-label="On this page">\n<ul>\n{links}\n</ul>\n</nav>'


def _anchor(report: StationReport, section: Section) -> str:
    words = "".join(letter if letter.isalnum() else " " for letter in section.heading.lower()).split()
    return f"{report.name}-{'-'.join(words)}"


def _article(report: StationReport, *, alone: bool) -> str:
    # One h1 on the page: the station's own title where it stands alone, else the title above all stations.
    level = 1 if alone else 2
    parts = [
        f'<article id="{escape(report.name)}">',
        f"<h{level}>{escape(report.title)}</h{level}>",
        f'<p class="lead">{report.lead}</p>',
    ]
    for section in report.sections:
        parts.append(f'<section id="{escape(_anchor(report, section))}">')
        parts.append(f"<h{level + 1}>{escape(section.heading)}</h{level + 1}>")
        parts.extend(_block(block) for block in section.blocks)
        parts.append("</section>")
    if report.checks:
        parts.append('<ul class="checks" aria-label="Checks">')
        parts.extend(_check(check) for check in report.checks)
        parts.append("</ul>")
    parts.append("</article>")
    return "\n".join(parts)


def _block(block: str | Gallery | Table) -> str:
    if isinstance(block, str):
        return f"<p>{block}</p>"
    return _gallery(block) if isinstance(block, Gallery) else _table(block)


def _gallery(gallery: Gallery) -> str:
    alone = len(gallery.pictures) == 1
    pictures = "\n".join(_picture(picture) for picture in gallery.pictures)
    caption = f"<figcaption>{escape(gallery.caption)}</figcaption>\n" if gallery.caption else ""
    kind = "single" if alone else f"gallery of-{len(gallery.pictures)}"
    return f'<figure class="{kind}">\n<div>\n{pictures}\n</div>\n{caption}</figure>'


def _picture(picture: Picture) -> str:
    image = (
        f'<img src="{escape(picture.path)}" alt="{escape(picture.alt)}" '
        f'width="{picture.width}" height="{picture.height}">'
    )
    if picture.dark is not None:
        # A dark picture only on a dark screen: on paper the light one is right whatever the reader's setting.
        media = "screen and (prefers-color-scheme: dark)"
        image = f'<picture><source srcset="{escape(picture.dark)}" media="{media}">{image}</picture>'
    return f"<figure>{image}<figcaption>{escape(picture.caption)}</figcaption></figure>"


def _table(table: Table) -> str:
    def cell(tag: str, column: int, text: str, scope: str = "") -> str:
        kind = ' class="number"' if column in table.numeric else ""
        return f"<{tag}{kind}{scope}>{escape(text)}</{tag}>"

    header = "".join(cell("th", column, text, ' scope="col"') for column, text in enumerate(table.header))
    rows = "\n".join(
        "<tr>"
        + cell("th", 0, row[0], ' scope="row"')
        + "".join(cell("td", column, text) for column, text in enumerate(row) if column)
        + "</tr>"
        for row in table.rows
    )
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(table.caption)}"><table>\n'
        f"<caption>{escape(table.caption)}</caption>\n<thead><tr>{header}</tr></thead>\n"
        f"<tbody>\n{rows}\n</tbody></table></div>{note}"
    )


def _check(check: Check) -> str:
    mark, kind = ("✓", "passed") if check.passed else ("✗", "failed")
    return (
        f'<li class="{kind}"><span aria-hidden="true">{mark}</span> {escape(check.name)}: '
        f"{escape(check.detail)} <strong>({kind})</strong></li>"
    )


_STYLE = """
:root {
  --ink: #1d1f21; --soft: #5a6067; --line: #d9dcdf; --ground: #fdfcfa; --panel: #f3f1ec; --accent: #0b5c8a;
  --good: #23683a; --bad: #a3261d;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --ink: #e6e4df; --soft: #a4a8ac; --line: #3a3f45; --ground: #15171a; --panel: #1f2226; --accent: #7cc0ea;
    --good: #7fcf97; --bad: #f0938b;
  }
}
* { box-sizing: border-box; }
html { font-size: 106.25%; -webkit-text-size-adjust: 100%; }
body {
  margin: 0; padding: 0 1.1rem 3rem; background: var(--ground); color: var(--ink);
  font-family: Charter, "Bitstream Charter", "Sitka Text", Cambria, Georgia, serif; line-height: 1.55;
}
main, footer { max-width: 56rem; margin-inline: auto; }
h1, h2, h3 { line-height: 1.2; text-wrap: balance; max-width: 44rem; }
h1 { font-size: clamp(1.8rem, 5vw, 2.6rem); margin: 2.6rem 0 0.8rem; letter-spacing: -0.01em; }
h2 { font-size: 1.45rem; margin: 2.6rem 0 0.6rem; }
h3 { font-size: 1.15rem; margin: 2rem 0 0.5rem; }
p, .checks { max-width: 44rem; margin: 0 0 1rem; }
.lead { font-size: 1.15rem; color: var(--soft); }
a { color: var(--accent); text-underline-offset: 0.15em; }
a:focus-visible, [tabindex]:focus-visible { outline: 3px solid var(--accent); outline-offset: 3px; }
.skip { position: absolute; left: -100vw; }
.skip:focus { left: 1rem; top: 0.5rem; background: var(--ground); padding: 0.3rem 0.6rem; }
code, pre { font-family: ui-monospace, "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { font-size: 0.88em; }
pre { background: var(--panel); padding: 0.8rem 1rem; border-radius: 6px; overflow-x: auto; max-width: 44rem; }
pre code { font-size: 0.85rem; }
sub { line-height: 0; }
.equation { display: block; text-align: center; font-size: 1.1rem; margin: 1.2rem 0; overflow-wrap: anywhere; }
figure { margin: 0; }
figure.gallery, figure.single { margin: 1.4rem 0 1.8rem; }
figure.gallery > div { display: grid; gap: 1rem; }
figure.gallery > div { grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)); }
figure.gallery.of-4 > div { grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
figure.single > div { max-width: 44rem; }
img { display: block; width: 100%; height: auto; border-radius: 4px; }
figcaption { font-size: 0.86rem; color: var(--soft); margin-top: 0.4rem; line-height: 1.4; }
.wide { overflow-x: auto; margin: 1.4rem 0 0.5rem; }
table { border-collapse: collapse; font-size: 0.9rem; min-width: 100%; }
caption { text-align: left; font-weight: bold; padding-bottom: 0.5rem; }
th, td { text-align: left; padding: 0.4rem 0.9rem 0.4rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { border-bottom: 2px solid var(--soft); vertical-align: bottom; }
tbody th { font-weight: normal; white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
th, td { padding-right: 1.1rem; }
th:last-child, td:last-child { padding-right: 0; }
.note { font-size: 0.86rem; color: var(--soft); }
.checks { list-style: none; padding: 0.8rem 1rem; background: var(--panel); border-radius: 6px; font-size: 0.92rem; }
.checks .passed span, .checks .passed strong { color: var(--good); }
.checks .failed span, .checks .failed strong { color: var(--bad); }
nav ul, footer ul { padding-left: 1.2rem; margin: 0.4rem 0 0; }
footer { color: var(--soft); font-size: 0.9rem; }
footer h2 { font-size: 1.05rem; color: var(--ink); margin-top: 2rem; }
footer li { overflow-wrap: anywhere; max-width: 44rem; }
@media print {
  html { font-size: 10.5pt; }
  body { background: none; padding: 0; }
  nav, .skip { display: none; }
  figure, table, pre, .checks { break-inside: avoid; }
  h1, h2, h3 { break-after: avoid; }
  figure.gallery > div { grid-template-columns: repeat(3, 1fr); }
  figure.gallery.of-2 > div, figure.gallery.of-4 > div { grid-template-columns: repeat(2, 1fr); }
}
"""
