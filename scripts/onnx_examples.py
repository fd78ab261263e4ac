"""A few lines for each task that run an ONNX file with onnxruntime, numpy and Pillow alone: what is written beside the file."""

from string import Template

START = '''"""$what: python $stem.py $given"""
import json, sys
from pathlib import Path
import numpy as np
import onnxruntime$extra

file = Path(__file__)
about = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
session = onnxruntime.InferenceSession(str(file.with_suffix(".onnx")), providers=["CPUExecutionProvider"])
'''
PICTURE = """picture = ImageOps.exif_transpose(Image.open(sys.argv[1])).convert("RGB")
$resize
pixels = (np.asarray(picture, np.float32)$channels / 255 - about["picture"]["mean"]) / about["picture"]["std"]
pixels = pixels.transpose(2, 0, 1)[None].astype(np.float32)  # (1, 3, height, width)
"""
CLASSES = """
logits = session.run(["logits"], {"pixel_values": pixels})[0][0]
share = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
for k in share.argsort()[::-1][:5]:
    print(about["classes"][k], f"{share[k]:.4f}")
"""
BOXES = """
inputs = {"pixel_values": pixels, "pixel_mask": np.ones(pixels.shape[:1] + pixels.shape[2:], np.int64)}
logits, boxes = session.run(["logits", "pred_boxes"], {each.name: inputs[each.name] for each in session.get_inputs()})
$scores
for score, (x, y, w, h) in zip(scores, boxes[0] * [width, height, width, height]):  # middle and sides, in pixels
    if score.max() >= about["threshold"]:
        corners = x - w / 2, y - h / 2, x + w / 2, y + h / 2
        print(about["classes"][score.argmax()], f"{score.max():.4f}", *(f"{place:.1f}" for place in corners))
"""
SOFTMAX = '''scores = np.exp(logits[0] - logits[0].max(1, keepdims=True))
scores = (scores / scores.sum(1, keepdims=True))[:, :-1]  # the last column is "no object"'''
SIGMOID = "scores = 1 / (1 + np.exp(-logits[0]))  # (queries, classes)"
POINTS = """
keypoints, scores = session.run(["keypoints", "scores"], {"pixel_values": pixels})
for name, (x, y), score in zip(about["keypoints"], keypoints[0] * [w, h] + [left, top], scores[0]):  # in pixels
    print(name, f"{x:.1f} {y:.1f} {score:.4f}")
"""
# The frame of the picture's middle with the graph's ratio; its edges fall on the centres of the graph's first and last pixels.
CUT_OUT = """(rows, columns), (width, height) = about["picture"]["size"], picture.size
w, h = max(width, height * columns / rows), max(height, width * rows / columns)
left, top, n = (width - w) / 2, (height - h) / 2, max(1, int(min(w / columns, h / rows)))
a, b = w / (columns - 1), h / (rows - 1)
data = (a / n, 0, (left + 0.5 - 0.5 * a) / n, 0, b / n, (top + 0.5 - 0.5 * b) / n)
picture = picture.reduce(n).transform((columns, rows), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)"""
VOICE = """
# Content features of the model that about["content"] names, and the pitch that the sound is to have
content, f0 = np.load(sys.argv[1]), np.load(sys.argv[2])  # (T, $width), (T,) Hz or 0; 100 frames a second
frames, random = len(content), np.random.default_rng(0)  # the same numbers, the same sound
inputs = {"phone": content[None], "phone_lengths": [frames], "ds": [0], "rnd": random.standard_normal((1, $inter, frames))}
mel = 1127 * np.log1p(f0 / 700)
low, high = 1127 * np.log1p(50 / 700), 1127 * np.log1p(1100 / 700)
inputs["pitch"] = np.clip(np.rint(1 + 254 * (mel - low) / (high - low)), 1, 255)[None]
inputs |= {"pitchf": f0[None], "noise": random.standard_normal((1, 1, frames * $hop)), "phase": [0]}
kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
asked = {each.name: np.asarray(inputs[each.name], kinds[each.type]) for each in session.get_inputs()}
samples = session.run(["audio"], asked)[0][0, 0]
with wave.open(sys.argv[3], "wb") as sound:
    sound.setparams((1, 2, about["sample_rate"], 0, "NONE", ""))
    sound.writeframes((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())
"""


def example(about: dict, stem: str) -> str:
    """The lines for a file of this content (its .json) and name."""
    task = about["task"]
    if task == "voice_rvc":
        start = Template(START).substitute(what="A voice", stem=stem, given="content.npy f0.npy out.wav", extra="\nimport wave")
        return start + Template(VOICE).substitute(width=about["content_width"], inter=about["inter_channels"], hop=about["hop"])
    what = {"detection": "Objects", "pose": "Keypoints"}.get(task, "Classes") + " of a picture"
    start = Template(START).substitute(what=what, stem=stem, given="photo.jpg", extra="\nfrom PIL import Image, ImageOps")
    channels = "[:, :, ::-1]" if about["picture"]["channels"] == "BGR" else ""
    picture = Template(PICTURE).substitute(resize=resizing(about), channels=channels)
    scores = SOFTMAX if about.get("no_object") else SIGMOID
    body = {"detection": BOXES, "pose": POINTS}.get(task, CLASSES)
    return start + picture + Template(body).substitute(scores=scores)


def resizing(about: dict) -> str:
    """The lines that bring `picture` to the size that the graph takes."""
    picture = about["picture"]
    if about["task"] == "pose":
        return CUT_OUT
    size, way = picture["size"], f"Image.Resampling.{picture['resample'].upper()}"
    lines = ["width, height = picture.size"]
    if len(size) == 2:
        lines.append(f"picture = picture.resize(({size[1]}, {size[0]}), {way})")
    else:
        short = f"min({size[0]}, {picture['longest']} * low / high)" if picture.get("longest") else f"{size[0]}"
        lines += ["low, high = sorted(picture.size)", f"short = {short}"]
        lines.append("sides = round(short), int(short * high / low)  # as in training: the longer one is cut off, not rounded")
        lines.append(f"picture = picture.resize(sides if width < height else sides[::-1], {way})")
    if picture.get("crop"):
        height, width = picture["crop"]
        lines.append(f"left, top = (picture.width - {width}) // 2, (picture.height - {height}) // 2")
        lines.append(f"picture = picture.crop((left, top, left + {width}, top + {height}))")
    return "\n".join(lines)
