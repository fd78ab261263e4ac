"""Pages of pictures with what a model says of them."""

from pathlib import Path

import numpy as np

# needs: pillow
from common.class_metrics import softmax, worst_first
from common.plots import RIGHT, WRONG, drawn_text, figure, font_file, plot_text, save_figure
from common.runtime import counted
from common.vision.pictures import decode

SIDE = 384  # pixels of a picture on a page; photographs of 24 million would take 70 MB each
GREY = "#666666"


def thumbnail(path: Path, side: int = SIDE):
    """A picture file as a PIL image whose longer side has `side` pixels: large ones reduced, small ones with pixels enlarged."""
    from PIL import Image

    image = Image.fromarray(decode(path))
    scale = side / max(image.size)
    size = [max(1, round(scale * length)) for length in image.size]
    return image.resize(size, Image.Resampling.NEAREST if scale > 3 else Image.Resampling.LANCZOS)


def draw_some(dataset, labels, logits, path: Path, count: int = 12) -> None:
    """A page of pictures that were drawn at random, the same at each call."""
    some = np.random.default_rng(0).permutation(len(labels))[:count]
    wrong = int((logits.argmax(axis=1) != labels).sum())
    draw_page(
        dataset,
        labels,
        logits,
        some,
        path,
        f"{len(some)} of {len(labels)} pictures, drawn at random; mistakes among all of them: {wrong}",
    )


def draw_mistakes(dataset, labels, logits, path: Path, count: int = 12) -> None:
    """A page of the most confident mistakes."""
    worst = worst_first(labels, logits)
    which = f"the {count} surest of " if len(worst) > count else ""
    title = f"{which}{counted(len(worst), 'mistake')} among {counted(len(labels), 'picture')}"
    draw_page(dataset, labels, logits, worst[:count], path, title)


def draw_page(dataset, labels, logits, indices, path: Path, title: str) -> None:
    """A page of pictures, each with its place in the data, its true class and the predicted one; mistakes in red, framed."""
    indices = list(indices)
    columns = max(1, min(4, len(indices)))
    drawing, axes = figure(max(1, -(-len(indices) // columns)), columns, width=2.7, height=3.1)
    drawing.get_layout_engine().set(h_pad=0.12)  # inches
    drawing.suptitle(title, fontsize=10)
    for axis in axes.flat:
        axis.grid(False)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for axis, index in zip(axes.flat, indices, strict=False):
        probabilities = softmax(logits[index].astype(np.float64))
        sample, guess = dataset.samples[index], int(probabilities.argmax())
        true, said = (plot_text(dataset.classes[k], 26) for k in (labels[index], guess))
        color = RIGHT if guess == labels[index] else WRONG
        axis.imshow(thumbnail(sample.path))
        axis.set_title(plot_text("/".join(sample.name.split("/")[-2:]), 34), fontsize=7, color=GREY)
        axis.set_xlabel(f"true: {true}\nsaid: {said} {probabilities[guess]:.2f}", fontsize=8, color=color)
        if guess != labels[index]:
            axis.spines[:].set(visible=True, color=WRONG, linewidth=2.5)
    save_figure(drawing, path)


def draw_answer(source: Path, answers: list[dict], path: Path) -> None:
    """The picture, with bars of its most probable classes beside it. By PIL: ten times as fast as a figure of matplotlib's."""
    from PIL import Image, ImageDraw, ImageFont

    picture, font, line, bar = thumbnail(source), ImageFont.truetype(font_file(), 13), 36, 240
    height = max(picture.height + 30, 38 + line * len(answers))
    page = Image.new("RGB", (SIDE + 60 + bar + 70, height), "white")
    page.paste(picture, ((SIDE - picture.width) // 2 + 10, 26))
    draw = ImageDraw.Draw(page)
    draw.text((10, 5), drawn_text(source.name, 60), fill=GREY, font=font)
    left = SIDE + 30
    for i, answer in enumerate(answers):
        top = 28 + line * i
        draw.text((left, top), drawn_text(answer["class"]), fill="black", font=font)
        draw.rectangle([left, top + 18, left + bar, top + 28], fill="#eeeeee")
        draw.rectangle([left, top + 18, left + round(bar * answer["probability"]), top + 28], fill="#1f77b4")
        draw.text((left + bar + 8, top + 15), f"{answer['probability']:.3f}", fill="black", font=font)
    page.save(path)
