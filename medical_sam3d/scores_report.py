"""What an evaluation leaves: report.md, results.csv, pictures, the page of meshes; and what it prints."""

import csv
import io
from pathlib import Path

from common.batches import to_device
from common.checkpoint import write_text
from common.config import one_line
from common.runtime import counted
from mesh_page import CaseViews, View, html_table, write_page
from metrics import one_of
from pages import Shown, draw_planes, draw_scores, worst_median_best
from surface_scores import signed_distances
from systems import (
    ABOUT,
    FEWEST,
    FILLED,
    FLOOR,
    SCORED,
    answers_to,
    by_organ,
    differences,
    mean_of_organs,
    of_system,
    place_of,
    system_scores,
)

# Columns of results.csv after those that name the organ: key of a row -> (column with its unit, what the value is multiplied by)
COLUMNS = {
    "dice": ("dice", 1),
    "iou": ("iou", 1),
    "hd": ("hd_mm", 1),
    "hd95": ("hd95_mm", 1),
    "assd": ("assd_mm", 1),
    "nsd": ("nsd", 1),
    "chamfer_mm": ("chamfer_mm", 1),
    "volume_error": ("volume_error_percent", 100),
    "pred_ml": ("volume_ml", 1),
    "truth_ml": ("true_volume_ml", 1),
}
NAMES = ("case", "organ", "patient", "system", "outcome")
WORST = 5  # organs that the report names
ON_PAGE = 12  # organs whose meshes can be turned
DEFINITIONS = """
All distances are in mm, through the affine of the true mask, on whose voxels every prediction is compared.

- **Dice**, **IoU**: overlap of voxels, from 0 to 1.
- **Surface**: the boundary voxels of a mask, those with one of their six neighbours outside, by their centres. Distances run
  from each boundary voxel of one mask to the nearest of the other, both ways: surface to surface.
- **HD95**: the greater of the two directed 95th percentiles. **ASSD**: the mean over all distances of both directions.
- **NSD**: the share of all boundary voxels of both masks that are within {tolerance:g} mm of the other surface.
- **Chamfer**: between meshes, the mean of the two directed mean distances of points drawn evenly over one surface to the other
  surface. Not squared.
- **Volume error**: (prediction - truth) / truth, with its sign; its mean is a bias.
- **Missed and ghosts**: an organ without a prediction has Dice 0 and infinite distances, is counted as missed and never left
  out: a mean with a miss is infinite, and the mean over the others stands in brackets. A prediction without an organ (a ghost)
  has Dice 0. Where both are empty there is nothing to score.
- **Intervals**: 95 %, patients drawn anew with all their organs (bootstrap, widened for few patients as Student's t is); none
  of fewer than {fewest} patients. A difference is paired: the same organs by both.
"""


def number_text(value: float) -> str:
    """A score with the digits that say something: 0.912, 2.65, 61.3."""
    return f"{value:.3f}" if abs(value) <= 1 else f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def mean_text(score: dict, times: float = 1) -> str:
    """A mean with its interval; inf and the mean of the others where organs are missed; - where there are none."""
    if not score["n"]:
        return "-"
    if score["infinite"]:
        rest = "" if score["mean_finite"] is None else f", {number_text(score['mean_finite'] * times)} over the others"
        return f"inf\n({score['infinite']} missed{rest})"
    ends = "" if score["interval"] is None else "\n({} to {})".format(*(number_text(end * times) for end in score["interval"]))
    return number_text(score["mean"] * times) + ends


def median_text(score: dict, times: float = 1) -> str:
    return "-" if not score["n"] else "inf" if score["median"] is None else number_text(score["median"] * times)


def markdown_table(head: list[str], lines: list[list]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(plain(cell) for cell in row)} |" for row in rows) + "\n"


def plain(text) -> str:
    """A stranger's name as Markdown that shows it: on one line, no HTML, no end of a cell."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def system_lines(systems: dict[str, dict], text=mean_text) -> list[list[str]]:
    """A line for each system: name, n, missed, and each of SCORED as `text` says it."""
    return [
        [name, scores["dice"]["n"], len(scores["missed"]), *(text(scores[key], times) for key, (_, times) in SCORED.items())]
        for name, scores in systems.items()
    ]


def difference_text(difference: dict) -> str:
    """One paired difference, and what it says."""
    mean = "" if difference["mean"] is None else f"{difference['mean']:+.3f}"
    ends = "" if difference["interval"] is None else " ({:+.3f} to {:+.3f})".format(*difference["interval"])
    return "\n".join(filter(None, (mean + ends, difference["says"])))


def difference_lines(found: list[dict]) -> tuple[list[str], list[list[str]]]:
    """(head, lines) of a table: a line for each system that differences are taken to, a column for each metric."""
    cells = {}
    for each in found:
        cells.setdefault(each["to"], {})[each["metric"]] = difference_text(each)
    metrics = list(dict.fromkeys(each["metric"] for each in found))
    lines = [[name, *(row.get(key, "-") for key in metrics)] for name, row in cells.items()]
    return ["compared with", *(SCORED[key][0] for key in metrics)], lines


def write_report(path: Path, title: str, about: list[str], rows: list[dict], own: str, config) -> None:
    """report.md of the rows of systems.score_systems. about: lines on data and model; own: the system that was trained."""
    head = ["", "n", "missed", *(title for title, _ in SCORED.values())]
    systems, organs = system_scores(rows), by_organ(rows)
    parts = [f"# {title}\n", "".join(f"- {plain(line)}\n" for line in about)]
    parts += ["## All organs: means\n", markdown_table(head, system_lines(systems))]
    parts += ["".join(f"- {name}: {ABOUT[name]}.\n" for name in systems if name in ABOUT)]
    parts += ["## All organs: medians\n", markdown_table(head, system_lines(systems, median_text))]
    found = differences(rows, own)
    parts += [
        f"## {own} less each of the others: mean paired difference{where_known(found)}\n",
        markdown_table(*difference_lines(found)),
    ]
    parts += ["## Each organ: means\n", *(f"### {name}\n\n{markdown_table(head, system_lines(organs[name]))}" for name in organs)]
    if len(organs) > 1:
        means = {name: [mean_of_organs(organs, name, key) for key in SCORED] for name in systems}
        times = [times for _, times in SCORED.values()]
        lines = [
            [name, *("-" if m is None else number_text(m * t) for m, t in zip(row, times, strict=True))]
            for name, row in means.items()
        ]
        parts += [
            f"## Mean of the {len(organs)} organs' means, each organ counting once\n",
            markdown_table(["", *head[3:]], lines),
        ]
    parts += [worst_organs([row for row in rows if row["system"] == own], own), faults_of(systems)]
    parts += ["![scores of each organ](scores.png)\n\n![predictions over the truth, in three planes](planes.png)\n"]
    parts += ["## What the numbers are\n" + DEFINITIONS.format(tolerance=config.tolerance, fewest=FEWEST)]
    write_text(path, "\n".join(part for part in parts if part))


def where_known(scores: list[dict]) -> str:
    """What a table's title says of intervals: nothing where there is none, as of few patients."""
    return " (95 % interval)" if any(score["interval"] for score in scores) else ""


def worst_organs(rows: list[dict], own: str) -> str:
    rows = sorted((row for row in rows if row["dice"] is not None), key=lambda row: (row["dice"], -row["hd95"]))[:WORST]
    lines = [[place_of(row), number_text(row["dice"]), number_text(row["hd95"]), row["outcome"]] for row in rows]
    return f"## Where {own} is worst\n\n" + markdown_table(["case/organ", "Dice", "HD95 (mm)", "outcome"], lines)


def faults_of(systems: dict[str, dict]) -> str:
    """Missed organs and ghosts by their names."""
    lines = [[name, kind, ", ".join(row[kind])] for name, row in systems.items() for kind in ("missed", "ghosts") if row[kind]]
    table = (
        markdown_table(["system", "what", "case/organ"], lines) if lines else "No organ was missed, and there are no ghosts.\n"
    )
    return f"## Missed organs and ghosts\n\n{table}"


def write_csv(path: Path, rows: list[dict]) -> None:
    """results.csv: a row for each case, organ and system, the unit in the column's name; inf: missed; empty: nothing to score."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*NAMES, *(column for column, _ in COLUMNS.values())])
    for row in rows:
        scores = ("" if row[key] is None else f"{row[key] * times:.6g}" for key, (_, times) in COLUMNS.items())
        writer.writerow([*(row[name] for name in NAMES), *scores])
    write_text(path, text.getvalue())


def say_scores(rows: list[dict], own: str) -> None:
    """Prints the means of all systems, and how the trained one differs from the others in Dice."""
    shown = ("dice", "hd95", "assd", "nsd")
    print(" " * 24 + "".join(f"{SCORED[key][0]:>24}" for key in shown))
    for name, scores in system_scores(rows).items():
        missed = f"  {len(scores['missed'])} missed" if scores["missed"] else ""
        print(f"  {name:22}" + "".join(f"{one_line(mean_text(scores[key])):>24}" for key in shown) + missed)
    for each in differences(rows, own):
        if each["metric"] == "dice":
            many = f"{counted(each['n'], 'organ')} of {counted(each['patients'], 'patient')}"
            print(f"  {own} less {each['to']}, {many}: Dice {one_line(difference_text(each))}")


# ---- all that is left ------------------------------------------------------------------------------------------------


def leave_results(folder: Path, config, about: dict, rows: list[dict], own: str, loader, systems: dict) -> None:
    """report.md, results.csv, scores.png, planes.png and page.html. rows: of systems.score_systems, own: the trained system.

    about: facts as eval.json has them; loader, systems: what the rows were made of, to make a few organs' meshes once more.
    """
    title = f"Meshes of {about['split']} organs: {own}"
    seen = f"one slice in {about['every']} of a mask" if about["every"] > 1 else "all slices of a mask"
    many = f"{counted(about['organs'], 'organ')} of {counted(about['patients'], 'patient')}"
    lines = [
        f"Data: {about['data']}, {about['split']} split, {many}.",
        f"Seen: {seen}. Base: {about['base']['name']}. Checkpoint: {config.checkpoint}.",
    ]
    write_report(folder / "report.md", title, lines, rows, own, config)
    write_csv(folder / "results.csv", rows)
    panels = {"dice": "Dice", "hd95": "HD95 (mm)", "nsd": f"NSD at {config.tolerance:g} mm"}
    draw_scores(rows, panels, folder / "scores.png")

    mine = of_system(rows, own)
    words = {row["index"]: word for word, row in worst_median_best(mine).items()}
    shown, cases = [], []
    for row in page_rows(mine):
        answers = answers_again(loader, row["index"], systems)
        organ, name = loader.dataset.organ(row["index"]), place_of(row)
        word = words.get(row["index"])
        said = f"{word}: {name}" if word else name
        if word:
            masks = {own: answers[own].mask, FILLED: answers[FILLED].mask}
            shown.append(Shown(f"{said}, Dice {row['dice']:.3f}", organ, masks))
        scores = {each["system"]: each for each in rows if each["index"] == row["index"]}
        cases.append(CaseViews(said, [view_of(name, answer, scores[name], organ) for name, answer in answers.items()]))
    draw_planes(shown, folder / "planes.png")
    head = ["", "n", "missed", *(title for title, _ in SCORED.values())]
    means, found = system_scores(rows), differences(rows, own)
    known = where_known([scores[key] for scores in means.values() for key in SCORED])
    tables = {f"All organs: means{known}": html_table(head, system_lines(means))}
    tables[f"{own} less each of the others, paired{where_known(found)}"] = html_table(*difference_lines(found))
    pictures = {"Scores": folder / "scores.png", "Over the truth, in three planes": folder / "planes.png"}
    write_page(folder / "page.html", title, lines, cases, tables, pictures)


def page_rows(rows: list[dict]) -> list[dict]:
    """At most ON_PAGE of the rows, the worst first, evenly from the worst to the best."""
    rows = sorted((row for row in rows if row["dice"] is not None), key=lambda row: row["dice"])
    many = min(len(rows), ON_PAGE)
    places = [round(i * (len(rows) - 1) / max(1, many - 1)) for i in range(many)]
    middle = len(rows) // 2
    if many and middle not in places:  # the median is named on the page and pictured
        places[min(range(many), key=lambda i: abs(places[i] - middle))] = middle
    return [rows[place] for place in places]


def answers_again(loader, index: int, systems: dict) -> dict:
    """What the systems make of one organ (systems.answers_to), on this process alone."""
    device = next(next(iter(systems.values())).parameters()).device
    batch = to_device(loader.collate_fn([loader.dataset[0, index]]), device)
    return answers_to(one_of(batch, 0), loader.dataset, systems)


def view_of(name: str, answer, row: dict, organ) -> View:
    """A system's mesh on the page."""
    if name == FLOOR:
        return View("truth", f"{row['truth_ml']:.1f} ml", answer.mesh, None)
    caption = f"Dice {row['dice']:.3f}, HD95 {row['hd95']:.1f} mm" if row["outcome"] == "found" else "missed: no surface"
    return View(name, caption, answer.mesh, signed_distances(answer.mesh.vertices, organ))
