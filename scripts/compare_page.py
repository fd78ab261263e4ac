"""A comparison as one HTML page that holds everything: pictures and sounds are in it, no script and no other file is needed."""

import base64
import tempfile
from html import escape
from pathlib import Path

from compare_plots import draw_classes, draw_pareto, draw_ranks, draw_sweep
from compare_text import (
    agreement_table,
    all_table,
    before_name,
    behaviour_tables,
    columns_of_words,
    facts_table,
    how_to_read,
    labels_of,
    lora_of,
    made_by,
    methods_table,
    metrics_table,
    settings_that_differ,
)
from compare_words import megabytes, number

LARGEST_FILE = 3_000_000  # bytes of a picture or sound that goes into the page
TYPES = {  # of files that go into the page
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".wav": "audio/wav",
    ".mp3": "audio/mpeg",
    ".flac": "audio/flac",
    ".ogg": "audio/ogg",
}
BADGES = {
    "none": "no difference shown",
    "worse": "LoRA worse",
    "better": "LoRA better",
    "few": "too few samples",
    "unknown": "unknown",
}
LONG = 22  # characters of a cell that may take several lines, in a column that is wide enough for them


def html_page(title: str, sentence: str, records: list[dict], notes: list[str], picture: Path | None = None) -> str:
    """The whole page. picture: compare.png of a report on one comparison; one on all tasks has a small picture of each on top."""
    several, style = picture is None, Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        pictures = [pictures_of(record, Path(folder)) for record in records]
    parts = [f"<h1>{text(title)}</h1>", f'<p class="lead">{text(sentence)}</p>', *map(note, notes)]
    if several:
        parts += [scroll(*all_table(records))]
        parts += ["<section><h2>What a checkpoint's bytes buy</h2>", grid(found.pop(0) for found in pictures), "</section>"]
    for record, found in zip(records, pictures, strict=True):
        whole = [] if several else [wide(picture, f"Metric, sizes and times of {', '.join(labels_of(record))}")]
        parts += section(record, found, whole, alone=not several)
    parts += [
        "<section><h2>How to read it</h2><ul>",
        *(f"<li>{emphasis(line)}</li>" for line in how_to_read(records)),
        "</ul></section>",
    ]
    parts += ["<section><h2>Where it comes from</h2>", *map(origin_of, records), "</section>"]
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{text(title)}</title>'
    )
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{style}</style></head>\n<body><main>\n'
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def section(record: dict, pictures: list[str], whole: list[str], alone: bool) -> list[str]:
    """The section of one comparison. alone: it is the only one, and its claim stands on top already."""
    kind, lora = record["judgement"]["kind"], lora_of(record)
    badge = f'<span class="badge {kind}">{BADGES[kind].replace("LoRA", text(record["claimed"]))}</span>'
    parts = [f"<section><h2>{text(record['title'])} {badge}</h2>"]
    parts += [] if alone else [f"<p>{text(record['claim'])}</p>"]
    parts += [f"<p>{text(line)}</p>" for line in record["verdict"]] if alone else []
    parts += [*map(note, record["notes"]), scroll(*methods_table(record)), *whole, grid(pictures)]
    if "agreement" in lora:
        parts += ["<h3>Who is right</h3>", scroll(*agreement_table(record))]
    for title, head, rows in behaviour_tables(record):
        parts += [f"<h3>{text(title)}</h3>", scroll(head, rows)]
    if record["disagreements"]:
        parts += [
            "<h3>Where the two differ most</h3>",
            grid(disagreement(one, record) for one in record["disagreements"]),
        ]
    head, rows = metrics_table(record)
    for title, found in (
        ("Sizes and times", facts_table(record)[1]),
        ("All metrics", rows),
        ("Settings that differ", settings_that_differ(record)),
    ):
        parts += [f"<details><summary>{title}</summary>{scroll(head, found)}</details>"] if found else []
    return [*parts, "</section>"]


# Pieces ----------------------------------------------------------------------------------------------------------------


def text(words) -> str:
    """As HTML; bytes of a name that is not UTF-8 are written as escapes."""
    return escape(str(words).encode("utf-8", "backslashreplace").decode())


def emphasis(line: str) -> str:
    """*so* as <em>, `so` as <code>."""
    for mark, tag in (("*", "em"), ("`", "code")):
        pieces = (text(line) if mark == "*" else line).split(mark)
        line = "".join(f"<{tag}>{piece}</{tag}>" if i % 2 else piece for i, piece in enumerate(pieces))
    return line


def note(words: str) -> str:
    return f'<p class="note">Note: {text(words)}</p>'


def scroll(head: list[str], rows: list[list[str]]) -> str:
    """A table in a box of its own, which scrolls where the screen is narrow."""
    words, lengths = columns_of_words(rows), [max(map(len, column)) for column in zip(*rows, strict=True)]
    looks = [f'class="{"words " * (i in words)}{"long" * (lengths[i] > LONG)}"' for i in range(len(head))]
    lines = ["".join(f"<td {look}>{text(cell)}</td>" for look, cell in zip(looks, row, strict=True)) for row in rows]
    names = (text(name).replace("_", "_<wbr>") for name in head)
    head = "".join(f'<th scope="col" {look}>{name}</th>' for look, name in zip(looks, names, strict=True))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def grid(figures) -> str:
    figures = "".join(figures)
    return f'<div class="grid">{figures}</div>' if figures else ""


def data_uri(path: Path) -> str | None:
    """A file as it stands in the page; None of a kind or size that does not go into one."""
    kind = TYPES.get(path.suffix.lower())
    if kind is None or path.stat().st_size > LARGEST_FILE:
        return None
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def figure_of(path: Path, alt: str, caption: str = "") -> str:
    caption = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return f'<figure><img src="{data_uri(path)}" alt="{text(alt)}">{caption}</figure>'


def wide(path: Path, alt: str) -> str:
    """A picture that would be too small on a phone: in a box that scrolls."""
    return f'<div class="scroll" tabindex="0"><img class="wide" src="{data_uri(path)}" alt="{text(alt)}"></div>'


def pictures_of(record: dict, folder: Path) -> list[str]:
    """The figures of a comparison, that of bytes against the metric first."""
    points = [f"{run['label']} {megabytes(run['checkpoint_bytes'])} {number(run['metric'])}" for run in record["runs"]]
    alt = f"{record['title']}: checkpoint size against {record['metric']}: {', '.join(points)}; "
    alt += f"{before_name(record)} {number(record['before'])}"
    wanted = [(lambda path: draw_pareto([record], path), alt)]
    if record["sweep"]:
        best = [f"{method} best at {number(arm.get('best'))}" for method, arm in record["sweep"].items()]
        wanted += [(lambda path: draw_sweep(record, path), f"{record['metric']} over the learning rate: {', '.join(best)}")]
    if record["rank_curve"]:
        alt = f"{record['rank_curve']['metric']} over the rank that is left of the full and of the LoRA update"
        wanted += [(lambda path: draw_ranks(record, path), alt)]
    if record["per_class"]:
        alt = f"Difference of {record['per_class']['metric']} for each of {len(record['per_class']['values'])} names"
        wanted += [(lambda path: draw_classes(record, path), alt)]
    figures = []
    for draw, alt in wanted:
        draw(folder / "picture.png")
        figures.append(figure_of(folder / "picture.png", alt))
    return figures


def disagreement(one: dict, record: dict) -> str:
    """A sample on which the two differ: its picture, sound or mesh, and what both say of it."""
    place, caption = Path(record["beside"]), f"{one.get('file', '')}: {one.get('what', '')}"
    caption += f" | full: {one.get('full', '')} | LoRA: {one.get('lora', '')}"
    for kind in ("picture", "mesh", "audio"):
        if kind in one and (uri := data_uri(place / one[kind])):
            shown = (
                f'<audio controls preload="none" src="{uri}"></audio>'
                if kind == "audio"
                else f'<img src="{uri}" alt="{text(caption)}">'
            )
            return f"<figure>{shown}<figcaption>{text(caption)}</figcaption></figure>"
    return f"<figure><figcaption>{text(caption)}</figcaption></figure>"


def origin_of(record: dict) -> str:
    """Versions, machine, hashes and commands of a comparison."""
    where = record["provenance"]
    hashes = f"base sha256 {where['base_sha256']}\ndata sha256 {where['data_sha256']}"
    hashes += f" ({where['splits']} splits, one for each seed)" if where["splits"] > 1 else ""
    commands = text("\n".join([hashes, "", *where["commands"]]))
    said = f"<p><strong>{text(record['title'])}</strong>. {text(made_by(record))}</p>"
    return f"{said}<details><summary>Hashes and commands</summary><pre>{commands}</pre></details>"
