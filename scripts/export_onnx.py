"""Writes a finished run as an ONNX file, compares it with the model on real samples, and only then gives it its name.

    python scripts/export_onnx.py outputs/detection/lora --output outputs/shapes.onnx
    python scripts/export_onnx.py outputs/clip/full --output outputs/dogs.onnx --int8     # and dogs.int8.onnx, measured

An adapter is merged into its base in float32; where that would change its answers, it stays beside the weights in the graph, and
"merged" in the .json says so. Beside the file lie a .json of the same name, with all that a program needs to use it
(preprocessing, classes or keypoints, thresholds, what its inputs are), which the file holds as metadata, too, and a .py of a few
lines that runs it with onnxruntime, numpy and Pillow alone.
"""

import json
import os
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import Threads, UserError, cli, parse  # noqa: E402
from task_modules import checkpoint_first, is_adapter_beside, task_of  # noqa: E402

OPSET = 18  # of ONNX: the first that has all that the exporter writes; onnxruntime reads it since 1.14
MOST_BYTES = 2_000_000_000  # of one ONNX file
BATCH = 4
SAMPLES = 12  # real ones that the forms of a model are compared on
RUNS = 20  # that a time is the median of
LEAST_SHARE = 0.1  # of the weights that --int8 must reach
# Why a task has no ONNX file.
CANNOT = {
    "medical_sam3d": "its decoder works on as many voxels as an organ has and takes a surface out of them, by sparse "
    "convolutions and FlexiCubes, whose shapes depend on the values: ONNX has no graph for that. scripts/sam3d_checkpoint.py "
    "exports the decoder"
}


@dataclass
class ExportConfig:
    checkpoint: str = ""  # run folder or its checkpoints/best, full, LoRA or head; may be the first word, without the flag
    output: str = ""  # the .onnx file to write
    model: str = ""  # where an adapter's base is, if not under the name that it had in training
    data_dir: str = ""  # real samples to compare on; empty: the data that the checkpoint was trained on
    split: Literal["train", "val", "test"] = "val"  # which part of that data
    int8: bool = False  # write a second file with 8-bit weights in the linear layers, and measure what it costs
    threads: Threads = 0  # CPU threads of onnxruntime; 0: as it chooses
    overwrite: bool = False  # replace files that are there


def main(argv=None):
    from common.folders import check_data_dir

    config = parse(ExportConfig, checkpoint_first(argv))
    files = output_files(config)
    needs("onnx", "onnxruntime")
    from common.checkpoint import naming

    folder, origin = task_of(config.checkpoint)
    if reason := CANNOT.get(origin["task"]):
        raise UserError(f"{origin['task']}: {reason}")
    check_data_dir(config.data_dir, origin)
    files[0].parent.mkdir(parents=True, exist_ok=True)
    with naming(files[0]), tempfile.TemporaryDirectory(prefix=f".{files[0].name}.", dir=files[0].parent) as aside:
        places = [Path(aside) / file.name for file in files]
        export(config, folder, places)
        for place, file in reversed(list(zip(places, files, strict=True))):  # the graph last: where it is, all is
            os.replace(place, file)
    for file in files:
        print(file)


def output_files(config) -> list[Path]:
    """The files to be written: .onnx, .json and .py, with --int8 a second .onnx and .json. UserError where one is there."""
    from common.folders import check_place

    if not config.checkpoint or not config.output:
        raise UserError("name a run and a file: python scripts/export_onnx.py outputs/<task>/lora --output model.onnx")
    out = Path(config.output).expanduser()
    if out.suffix != ".onnx":
        raise UserError(f"--output {out} must end in .onnx")
    small = out.with_suffix(".int8.onnx")
    files = [out, out.with_suffix(".json"), out.with_suffix(".py")]
    files += [small, small.with_suffix(".json")] if config.int8 else []
    for file in files:
        if file.is_dir() or (file.exists() and not config.overwrite):
            raise UserError(f"{file} is there already" + ("" if file.is_dir() else "; --overwrite replaces it"))
    check_place("--output", out.parent)
    return files


def needs(*packages: str) -> None:
    """UserError where one of the packages is not installed."""
    import importlib.util

    if lacking := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise UserError(f"this needs the package {lacking[0]}: pip install {' '.join(lacking)}")


def export(config, folder: Path, places: list[Path]) -> None:
    """Writes the files to `places`, as of output_files, and checks them. UserError where a graph answers otherwise."""
    import torch

    from common.checkpoint import write_text
    from common.runtime import say
    from onnx_examples import example
    from onnx_models import OnnxModel, answers_from, form_of, plain_weights
    from parity import check
    from task_modules import load, open_data

    model, processor, origin = load(folder, config.model)
    task, model = origin["task"], plain_weights(model)
    if config.int8 and linear_share(model) < LEAST_SHARE:
        raise UserError(
            f"--int8: linear layers have {linear_share(model):.1%} of this model's weights, so there is nothing to gain"
        )
    data = open_data(folder, processor, origin, config.data_dir, config.split, BATCH)
    form = form_of(task, model, processor, origin)
    batches = real_inputs(form, model, data)
    record(form, model, batches[0], places[0])
    graph = OnnxModel(places[0], task, config.threads, model.config if task == "voice_rvc" else None)
    about = describe(task, model, processor, origin, graph)
    write_facts(places[0], about)
    forms = {"adapter" if origin["method"] == "lora" else "model": load(folder, config.model, merge=False)[0]}
    forms |= {"merged": model} if about.get("merged") else {}
    answers = {name: answers_from(form, each) for name, each in (forms | {"onnx": graph}).items()}
    with torch.inference_mode():
        check(answers, batches, unordered=form.unordered)
    text = example(about, Path(config.output).stem)
    write_text(places[2], text)
    say(f"{task}, opset {OPSET}, {places[0].stat().st_size / 1e6:.2f} MB")
    say(f"inputs: {in_words(about['inputs'])}; outputs: {in_words(about['outputs'])}")
    if config.int8:
        cost = quantize(places[0], places[3])
        small = OnnxModel(places[3], task, config.threads, graph.config)
        cost |= measure({"fp32": graph, "int8": small}, form, batches, task, processor, data)
        say_cost(cost)
        write_facts(places[3], about | {"int8": cost})
    say(f"{Path(config.output).stem}.py, to run it without this project:\n\n{text}")


def real_inputs(form, model, data) -> list[dict]:
    """What the graph gets of some real samples: one, three, whole batches, and where any size will do, lying on their side."""
    from itertools import islice

    from onnx_models import rows, turned

    whole = [form.inputs(model, batch) for batch in islice(data.loader, SAMPLES // BATCH)]
    other = [turned(whole[0])] if "pixel_mask" in whole[0] else []
    return [rows(whole[0], 1), rows(whole[0], 3), *whole, *other]


def record(form, model, inputs: dict, path: Path) -> None:
    """Writes the model's graph. UserError where the exporter cannot follow it, or one file cannot hold it.

    By the exporter that follows one run (dynamo=False): the newer one wants two more packages (onnxscript, onnx_ir).
    """
    import torch

    from common.checkpoint import disk_fault
    from onnx_models import Function, rows, shortened

    if sum(p.numel() * p.element_size() for p in model.parameters()) > MOST_BYTES:
        raise UserError(f"an ONNX file holds {MOST_BYTES / 1e9:g} GB at most, and this model has more")
    example = rows(inputs, 2)
    if form.hop:
        example = shortened(example, form.hop)
    moving = {name: sizes for name, sizes in form.moving.items() if name in (*inputs, *form.outputs)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each number of Python's that the graph has fixed: `check` finds those that matter
        try:
            torch.onnx.export(
                Function(model, form.call).eval(),
                tuple(example.values()),
                str(path),
                input_names=list(example),
                output_names=list(form.outputs),
                dynamic_axes=moving,
                opset_version=OPSET,
                dynamo=False,
            )
        except Exception as error:  # whatever the exporter makes of a library's model code
            if disk_fault(error):
                raise
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"this {type(model).__name__} has no ONNX graph ({type(error).__name__}: {reason})") from None
    tidy(path, form, [t.shape for t in form.call(model, *example.values())])


def tidy(path: Path, form, shapes) -> None:
    """Gives the outputs' sizes their numbers, where they are none of form.moving, and does without float64 where it can."""
    import onnx

    graph = onnx.load(str(path))
    for output, shape in zip(graph.graph.output, shapes, strict=True):
        for i, (place, size) in enumerate(zip(output.type.tensor_type.shape.dim, shape, strict=True)):
            if i not in form.moving[output.name]:
                place.dim_value = size
    use_floats(graph.graph, onnx.shape_inference.infer_shapes(graph).graph.value_info)
    onnx.save(graph, str(path))


def describe(task: str, model, processor, origin: dict, graph) -> dict:
    """What a program needs to know to use the graph: the content of the .json."""
    about = {
        "format": 1,
        "task": task,
        "method": origin["method"],
        "base": origin["base"],
        "base_license": "unknown: ask whoever published the base",
        "opset": OPSET,
        "inputs": graph.asks,
        "outputs": graph.gives,
    }
    if origin["method"] == "lora":
        about["merged"] = not is_adapter_beside(model)
    if task == "voice_rvc":
        facts, config = processor.to_json(), processor.config
        known = {key: getattr(config, key) for key in ("sample_rate", "hop", "content_width", "inter_channels", "f0")}
        return about | known | facts
    if task == "pose":
        from data import Preprocess

        ours = Preprocess(processor, model.facts["input_size"])
        known = {"keypoints": model.facts["names"], "skeleton": model.facts.get("skeleton", [])}
        return about | known | {"picture": scaling(ours) | {"size": list(ours.size)}}
    about["classes"] = origin["classes"]
    if task == "detection":
        from data import Preprocess

        ours, columns = Preprocess(processor, origin["image_size"]), graph.gives["logits"][-1]
        sides = [ours.size[key] for key in ("height", "width") if key in ours.size] or [ours.size["shortest_edge"]]
        size = {"size": sides, "longest": ours.size.get("longest_edge"), "resample": "bilinear"}
        known = {"threshold": origin.get("threshold") or 0.5, "no_object": columns == len(origin["classes"]) + 1}
        return about | known | {"picture": scaling(ours) | size}
    from common.vision.preprocess import ClassifierPreprocess

    ours = ClassifierPreprocess(processor)
    size = {"size": list(ours.size), "crop": ours.crop, "resample": ours.mode.value}
    return about | {"picture": scaling(ours) | size}


def scaling(preprocess) -> dict:
    """How values from 0 to 1 become what the graph takes; mean and std belong to the channels in their order there."""
    mean, std = (getattr(preprocess, key).flatten().tolist() for key in ("mean", "std"))
    return {"mean": mean, "std": std, "channels": "BGR" if getattr(preprocess, "reverse", False) else "RGB"}


def write_facts(path: Path, about: dict) -> None:
    """The facts as metadata of the ONNX file, a key each, as JSON, and as a .json beside it; the file is checked as a graph."""
    import onnx

    from common.checkpoint import write_json

    graph = onnx.load(str(path))
    onnx.helper.set_model_props(graph, {key: json.dumps(value, ensure_ascii=False) for key, value in about.items()})
    onnx.checker.check_model(graph, full_check=True)
    onnx.save(graph, str(path))
    write_json(path.with_suffix(".json"), about)


def use_floats(graph, values) -> None:
    """Sines and cosines of float64, as RT-DETR's position embedding has them, in float32: onnxruntime before 1.30 has no other.

    values: the graph's tensors with their types.
    """
    from onnx import TensorProto, helper

    wide, nodes = {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.DOUBLE}, []
    for node in graph.node:
        if node.op_type in ("Sin", "Cos") and node.input[0] in wide:
            given, made = (f"{node.output[0]}_{end}" for end in ("given", "made"))
            nodes.append(helper.make_node("Cast", [node.input[0]], [given], f"{node.name}_given", to=TensorProto.FLOAT))
            nodes.append(helper.make_node(node.op_type, [given], [made], node.name))
            nodes.append(helper.make_node("Cast", [made], list(node.output), f"{node.name}_made", to=TensorProto.DOUBLE))
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def in_words(tensors: dict) -> str:
    return ", ".join(f"{name} ({', '.join(map(str, shape))})" for name, shape in tensors.items())


# ---- 8 bits ----------------------------------------------------------------------------------------------------------


def linear_share(model) -> float:
    """Which share of a model's weights linear layers have."""
    from torch import nn

    linear = {p for module in model.modules() if isinstance(module, nn.Linear) for p in module.parameters()}
    return sum(p.numel() for p in linear) / sum(p.numel() for p in model.parameters())


def quantize(path: Path, out: Path) -> dict:
    """Writes the graph with the weights of its linear layers in 8 bits, one scale a column; {"share": of the weights, "bytes"}.

    What goes into such a layer is put into 8 bits as it comes (dynamic quantisation). Convolutions stay: in 8 bits onnxruntime's
    are slower on a CPU.
    """
    import logging

    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph, level = onnx.load(str(path)).graph, logging.root.level
    flat = {each.name for each in graph.initializer if len(each.dims) == 2}
    stacks = [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] not in flat]
    logging.root.setLevel(logging.ERROR)  # it advises a preparation that changes nothing here
    try:
        quantize_dynamic(
            path,
            out,
            op_types_to_quantize=["MatMul"],
            nodes_to_exclude=stacks,  # of matrices, which onnxruntime multiplies with one scale alone
            per_channel=True,
            weight_type=QuantType.QInt8,
        )
    finally:
        logging.root.setLevel(level)
    sizes = {"fp32": path, "int8": out}
    numbers = [onnx.numpy_helper.to_array(t) for t in onnx.load(str(out)).graph.initializer]
    sums = {kind: sum(each.size for each in numbers if each.dtype == kind and each.ndim > 1) for kind in ("int8", "float32")}
    small, every = sums["int8"], sum(sums.values())
    return {"share": small / every, "bytes": {form: file.stat().st_size for form, file in sizes.items()}}


def measure(graphs: dict, form, batches: list, task: str, processor, data) -> dict:
    """What 8 bits cost, printed: milliseconds at batch 1, the task's metric by both graphs, the largest difference."""
    from onnx_models import answers_from
    from parity import check
    from task_modules import METRICS, score

    name, _ = METRICS[task]
    cost = {"milliseconds": {kind: median_time(graph, batches[0]) for kind, graph in graphs.items()}}
    check({kind: answers_from(form, graph) for kind, graph in graphs.items()}, batches, float("inf"), form.unordered)
    cost[name] = {kind: score(task, graph, processor, data)[name] for kind, graph in graphs.items()}
    return cost


def say_cost(cost: dict) -> None:
    """A line that says how much is in 8 bits, then a row for each quantity: fp32, int8."""
    from common.runtime import say

    say(f"int8: {cost['share']:.0%} of the weights are in 8 bits; {'fp32':>16} {'int8':>12}")
    for name, values in cost.items():
        if isinstance(values, dict):
            say(f"  {name:{47}}" + " ".join("absent" if v is None else f"{v:>12,.4g}" for v in values.values()))


def median_time(graph, inputs: dict) -> float:
    """Milliseconds of one run, the median of RUNS."""
    times = []
    for _ in range(RUNS + 2):
        start = time.perf_counter()
        graph.run(**inputs)
        times.append(1000 * (time.perf_counter() - start))
    return sorted(times[2:])[RUNS // 2]


if __name__ == "__main__":
    cli(main)
