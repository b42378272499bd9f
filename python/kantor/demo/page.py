"""The page the demo writes: one self-contained ``index.html`` beside its pictures.

A station of the demo describes its part of the page with the small types below; :func:`write_page` turns the reports
of all stations that ran into HTML. The page uses no script and no network, follows the reader's light or dark
setting, prints, and fits a telephone; its looks are in ``page.css``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
class Finding:
    """A station in three sentences: the problem, who was compared on it, and by how much they differ."""

    problem: str
    compared: str
    ratio: str


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
    finding: Finding | None = None

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


def times(ratio: float) -> str:
    """A ratio with two digits, or as a whole number."""
    return f"{ratio:.2g}" if ratio < 10 else f"{ratio:,.0f}"


def between(ratios: Iterable[float]) -> str:
    """The least and the largest of some ratios, in words: "2.1 to 6.8"."""
    found = sorted(ratios)
    texts = times(found[0]), times(found[-1])
    return texts[0] if texts[0] == texts[1] else f"{texts[0]} to {texts[1]}"


def write_page(
    folder: Path, reports: Sequence[StationReport], *, command: str, versions: str, size: str = "full"
) -> Path:
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
    size : {"small", "full"}
        Of the stations, for the commands that run one alone.
    """
    path = folder / "index.html"
    path.write_text(render_page(reports, command=command, versions=versions, size=size), encoding="utf-8")
    return path


def render_page(reports: Sequence[StationReport], *, command: str, versions: str, size: str = "full") -> str:
    """Return the HTML of the page as one string; see :func:`write_page`."""
    alone = len(reports) == 1
    title = reports[0].title if alone else "Kantor on real data"
    articles = "\n".join(
        _article(report, size, "" if alone else f"Station {number} of {len(reports)}")
        for number, report in enumerate(reports, 1)
    )
    sources = "\n".join(f"<li>{text}</li>" for text in dict.fromkeys(text for r in reports for text in r.credits))
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    # A page of one station is a short article: its title is the page's, and it needs no list of contents.
    heading = "" if alone else f'<header>\n<h1>{escape(title)}</h1>\n<p class="lead">{_INTRODUCTION}</p>\n'
    heading += "" if alone else f"{_contents(reports)}\n</header>\n"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)} · Kantor</title>
<style>
{style}</style>
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
<h2>Sources</h2>
<ul>
{sources}
</ul>
</footer>
</body>
</html>
"""


_INTRODUCTION = (
    "Problems from real data, solved on this machine a moment ago. Each station says what the problem is, shows what "
    "came out, and sets Kantor beside programs that do the same. Every figure was measured in this run; yours will "
    "differ."
)


def _contents(reports: Sequence[StationReport]) -> str:
    links = "\n".join(
        f'<li><a href="#{escape(report.name)}">{escape(report.title)}</a>'
        + (f"<span>{escape(report.finding.ratio)}</span>" if report.finding else "")
        + "</li>"
        for report in reports
    )
    return f'<nav id="contents" aria-label="Contents">\n<ol>\n{links}\n</ol>\n</nav>'


def _anchor(report: StationReport, section: Section) -> str:
    words = "".join(letter if letter.isalnum() else " " for letter in section.heading.lower()).split()
    return f"{report.name}-{'-'.join(words)}"


def _article(report: StationReport, size: str, number: str) -> str:
    # One h1 on the page: the station's own title where it stands alone, else the title above all stations.
    level = 2 if number else 1
    parts = [
        f'<article id="{escape(report.name)}">',
        *([f'<p class="kicker">{number}</p>'] if number else []),
        f"<h{level}>{escape(report.title)}</h{level}>",
        f'<p class="lead">{report.lead}</p>',
        _finding(report, size),
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
    if number:
        parts.append('<p class="back"><a href="#contents">Back to the contents</a></p>')
    parts.append("</article>")
    return "\n".join(parts)


def _finding(report: StationReport, size: str) -> str:
    command = f"kantor demo --only {report.name}" + ("" if size == "full" else f" --size {size}")
    words = " ".join(f"<span>{escape(word)}</span>" for word in command.split())  # a line ends between words only
    rows = []
    if report.finding is not None:
        rows += [
            ("Problem", escape(report.finding.problem)),
            ("Compared", escape(report.finding.compared)),
            ("Result", escape(report.finding.ratio)),
        ]
    rows += [
        ("Run it alone", f"<code>{words}</code>"),
        ("Took", f"{report.seconds:.1f} s, pictures included"),
    ]
    return '<dl class="finding">\n' + "\n".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in rows) + "\n</dl>"


def _block(block: str | Gallery | Table) -> str:
    if isinstance(block, str):
        return f"<p>{block}</p>"
    return _gallery(block) if isinstance(block, Gallery) else _table(block)


def _gallery(gallery: Gallery) -> str:
    alone = len(gallery.pictures) == 1
    pictures = "\n".join(_picture(picture) for picture in gallery.pictures)
    caption = f"<figcaption>{escape(gallery.caption)}</figcaption>\n" if gallery.caption else ""
    kind = "single" if alone else f"gallery of-{len(gallery.pictures)}"
    if alone and gallery.pictures[0].height > gallery.pictures[0].width:
        kind += " tall"
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
        f"<caption><span>{escape(table.caption)}</span></caption>\n<thead><tr>{header}</tr></thead>\n"
        f"<tbody>\n{rows}\n</tbody></table></div>{note}"
    )


def _check(check: Check) -> str:
    mark, kind = ("✓", "passed") if check.passed else ("✗", "failed")
    return (
        f'<li class="{kind}"><span aria-hidden="true">{mark}</span> {escape(check.name)}: '
        f"{escape(check.detail)} <strong>({kind})</strong></li>"
    )
