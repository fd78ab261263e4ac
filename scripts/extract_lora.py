"""Makes an adapter out of a full fine-tune: what it changed in the layers that LoRA trains, at a low rank.

    python scripts/extract_lora.py outputs/detection/full                    # rank 8 of every layer
    python scripts/extract_lora.py outputs/detection/full --energy 0.9       # for each layer the rank that keeps 90 %
    python scripts/extract_lora.py outputs/detection/full --lora_targets all --norms

The change of a weight is split by singular values (nothing is nearer to it at that rank), the heads come along whole, and the
folder is one that train_lora.py might have left: eval_lora.py, infer_lora.py and PEFT load it. What no adapter holds is said
with its size: --norms carries norms and biases. Before the folder gets its name, the adapter read back from disk, beside its
base and merged, must answer as the truncated model does, on real samples.
"""

import copy
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import Count, Range, UserError, cli, parse  # noqa: E402
from parity import TOLERANCE, check  # noqa: E402
from task_modules import (  # noqa: E402
    METRICS,
    answers_of,
    base_below,
    card_of,
    checkpoint_first,
    first_batches,
    load,
    open_data,
    orders_queries,
    place_for,
    score,
    task_of,
)

LARGE = "layers and embeddings without an adapter"  # what no flag but --lora_targets brings along


@dataclass
class ExtractConfig:
    checkpoint: str = ""  # a full run's folder, or its checkpoints/best; may be the first word, without the flag
    model: str = ""  # where the base is, if not under the name that it had in training
    rank: Count = 8  # of every layer's change; not used with --energy
    energy: Annotated[float, Range(0, 1)] = 0.0  # for each layer the least rank that keeps this share of its change, squared
    lora_targets: str = ""  # which layers, as in train_lora.py; empty: as its default has it
    norms: bool = False  # carry norms and biases, too, which the full run changed and no adapter holds
    tolerance: Annotated[float, Range(0, 1)] = TOLERANCE  # by which forms may differ, as a share of an output's largest number
    data_dir: str = ""  # data to compare on; empty: the validation data of the run
    output_dir: str = ""  # the folder to make; empty: beside the run, <run>_r8 or, by --energy, <run>_e0.9
    overwrite: bool = False  # replace a folder that is there


# ---- what changed ----------------------------------------------------------------------------------------------------


def default_targets(origin: dict) -> str:
    """--lora_targets of the task's train_lora.py, where none is given."""
    from train_lora import Config

    field = Config.__dataclass_fields__["lora_targets"]
    return field.metadata.get("demo", field.default) if origin["base"]["name"] == "demo" else field.default


def target_layers(task: str, base, which: str, whole) -> list[str]:
    """Names of the layers that an adapter of this task goes on."""
    if task in ("voice_rvc", "medical_sam3d"):
        from common.own_adapters import own_targets
        from model import LORA_PRESETS, answer

        return own_targets(base, which, LORA_PRESETS, whole, answer)
    from model import lora_targets

    return lora_targets(base, which)


def split_layers(changed: dict, rank: int, energy: float) -> tuple[dict, dict[str, float]]:
    """({layer: (A, B)}, {layer: the share of its change that they hold}), without the layers that did not change.

    UserError where none did, or where none has so high a rank.
    """
    from common.runtime import progress_bar, say
    from low_rank import rank_at, shares_of, split

    most = max(min(delta.shape[-2:]) for delta in changed.values())
    if not energy and rank > most:
        raise UserError(f"--rank {rank}: no layer here has more than {most}, which keeps all of its change")
    pairs, kept = {}, {}
    for name, delta in progress_bar(changed.items(), "splitting"):
        if delta.any():
            down, up = split(delta)
            shares = shares_of(down.double().square().sum(-1))  # their square roots are in A, as in B
            r = rank_at(shares, energy) if energy else min(rank, len(shares))
            pairs[name], kept[name] = (down[..., :r, :].clone(), up[..., :r].clone()), float(shares[r - 1])
    if not pairs:
        raise UserError("the run changed none of the layers that an adapter would go on: there is nothing to extract")
    if still := len(changed) - len(pairs):
        say(f"{still} of {len(changed)} layers did not change and get no adapter")
    return pairs, kept


def beside(tuned, base, layers, whole) -> dict[str, list[str]]:
    """Kind -> names of the tensors that the run changed, and that are neither in these layers' weights nor in `whole`."""
    from common.lora import is_within

    old, left = base.state_dict(), {}
    for name, tensor in tuned.state_dict().items():
        layer, _, last = name.rpartition(".")
        in_adapter = last != "bias" and any(name.startswith(f"{each}.") for each in layers)
        if not (in_adapter or is_within(name, whole) or tensor.equal(old[name])):
            small = "biases beside the adapter" if last == "bias" and layer in layers else "norms and other biases"
            left.setdefault(small if tensor.ndim < 2 else LARGE, []).append(name)
    return left


def say_left(tuned, base, left: dict[str, list[str]], carried: bool) -> None:
    """What of the run is in no adapter, with its size, and what becomes of it."""
    from common.runtime import say

    new, old = tuned.state_dict(), base.state_dict()
    for kind, names in left.items():
        change = sum((new[name].double() - old[name].double()).square().sum() for name in names).sqrt()
        length = sum(old[name].double().square().sum() for name in names).sqrt().clamp(min=1e-12)
        much = f"{sum(new[name].numel() for name in names):,} numbers in {len(names)} tensors, changed by {change / length:.2%}"
        kept = carried and kind != LARGE
        say(f"  {kind}: {much} of their length; {'carried whole' if kept else 'lost: the base has its own'}")


# ---- the adapter -----------------------------------------------------------------------------------------------------


def with_adapter(base, pairs: dict, whole, carried: dict, task: str):
    """The base with these pairs {layer: (A, B)} on it, to be saved, in place.

    carried: tensors that go along whole, by the names that they have then: a bias beside an adapter is base_layer.bias.
    """
    import torch

    from common.lora import adapted_layers, all_tensors, is_within, put_lora

    ranks = {name: down.shape[-2] for name, (down, _) in pairs.items()}
    if task in ("voice_rvc", "medical_sam3d"):
        named = [name for name in all_tensors(base) if is_within(name, whole)]
        put_lora(base, {name: (r, r, 0.0, False) for name, r in ranks.items()}, [*named, *carried])
        for name, layer in adapted_layers(base).items():
            layer.take(*pairs[name])
        model = plain = base
    else:
        model = with_peft_pairs(base, pairs, ranks, (*whole, *carried))
        plain = model.get_base_model()
    with torch.no_grad():
        own = all_tensors(plain)
        for name, tensor in carried.items():
            own[name].copy_(tensor)
    return model


def with_peft_pairs(base, pairs: dict, ranks: dict[str, int], whole):
    """PEFT's model of the base with these pairs, alpha = r everywhere; saved with the parts `whole`."""
    import torch
    from peft import LoraConfig

    from common.peft_adapters import add_adapter

    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != common}
    settings = {"rank_pattern": others, "alpha_pattern": dict(others), "target_modules": list(ranks)}
    model = add_adapter(base, LoraConfig(r=common, lora_alpha=common, **settings), whole)
    with torch.no_grad():
        for name, (down, up) in pairs.items():
            layer = model.get_base_model().get_submodule(name)
            for place, matrix in ((layer.lora_A, down), (layer.lora_B, up)):
                place["default"].weight.copy_(matrix.reshape(place["default"].weight.shape))
    return model


def truncated(tuned, base, pairs: dict, left: dict, carried):
    """The model that the adapter is to be: the tuned one, its layers base + B A, and what no adapter holds as in the base."""
    from low_rank import set_pairs

    model, old = copy.deepcopy(tuned), base.state_dict()
    lost = {name: old[name] for names in left.values() for name in names if name not in carried}
    model.load_state_dict(lost, strict=False)
    set_pairs(model, base, pairs)
    return model.eval()


# ---- what is said of it ----------------------------------------------------------------------------------------------


def say_kept(changed: dict, pairs: dict, kept: dict[str, float]) -> float:
    """The share of the layers' change that their pairs hold, of squared lengths."""
    from common.runtime import counted, say

    lengths = {name: float(changed[name].double().square().sum()) for name in pairs}
    share = sum(kept[name] * lengths[name] for name in pairs) / sum(lengths.values())
    say(f"rank {in_words(pairs)} on {counted(len(pairs), 'layer')} keeps {share:.1%} of their change, squared")
    say(f"  the least of a layer: {min(kept.values()):.1%}, {min(kept, key=kept.get)}")
    return share


def in_words(pairs: dict) -> str:
    """The ranks: "8", or "3 to 11"."""
    ranks = [down.shape[-2] for down, _ in pairs.values()]
    low, high = min(ranks), max(ranks)
    return f"{low}" if low == high else f"{low} to {high}"


def say_scores(task: str, models: dict, processor, data) -> dict[str, float]:
    """Model -> the task's metric on the data."""
    from common.runtime import say

    scores = {name: score(task, model, processor, data)[METRICS[task][0]] for name, model in models.items()}
    told = {name: "absent" if value is None else f"{value:.4f}" for name, value in scores.items()}
    say("\n".join([f"{METRICS[task][0]} on {data.name}", *(f"  {name:22} {value}" for name, value in told.items())]))
    return scores


def main(argv=None):
    config = parse(ExtractConfig, checkpoint_first(argv))
    if not config.checkpoint:
        raise UserError("name a full run: python scripts/extract_lora.py outputs/<task>/full")
    # Heavy imports wait until the flags are read, so that --help answers at once.
    from common.checkpoint import atomic_folder, folder_bytes
    from common.folders import check_data_dir
    from common.runtime import say
    from common.saved_models import save_lora
    from low_rank import deltas

    folder, origin = task_of(config.checkpoint)
    if origin["method"] != "full":
        raise UserError(f"{folder} is no full fine-tune but of the method {origin['method']}: there is nothing to extract")
    ending = f"e{config.energy:g}" if config.energy else f"r{config.rank}"
    out, task = place_for(config.output_dir, folder, ending, config.overwrite), origin["task"]
    check_data_dir(config.data_dir, origin)
    tuned, processor, origin = load(folder)
    base, whole = base_below(folder, origin, tuned, config.model)

    # 1. What the run changed, at the rank that is asked for, and what is in no adapter.
    changed = deltas(tuned, base, target_layers(task, base, config.lora_targets or default_targets(origin), whole))
    pairs, kept = split_layers(changed, config.rank, config.energy)
    share = say_kept(changed, pairs, kept)
    left = beside(tuned, base, pairs, whole)
    say_left(tuned, base, left, config.norms)
    carried = {name: tuned.state_dict()[name] for kind in left if config.norms and kind != LARGE for name in left[kind]}

    # 2. What that costs.
    expected = truncated(tuned, base, pairs, left, carried)
    data = open_data(folder, processor, origin, config.data_dir)
    models = {"full fine-tune": tuned, "extracted": expected, "base, with its heads": base}
    scores = say_scores(task, models, processor, data)

    # 3. The adapter, which gets its name when it answers as the truncated model does.
    inner = {f"{name}.bias": f"{name}.base_layer.bias" for name in pairs}
    adapted = with_adapter(base, pairs, whole, {inner.get(name, name): tensor for name, tensor in carried.items()}, task)
    about = origin | {"method": "lora", "whole": [inner.get(name, name) for name in carried], "kept": share}
    lost = [f"{kind} ({len(names)})" for kind, names in left.items() if not set(names) <= set(carried)]
    facts = {
        "made by": "extract_lora.py from a full fine-tune: it was not trained as an adapter",
        "rank": in_words(pairs) + (f", by an energy of {config.energy:g}" if config.energy else ""),
        "of the layers' change": f"{share:.1%} (squared) kept",
        "changed by the run, and not in it": ", ".join(lost) or "nothing",
    }
    with atomic_folder(out) as aside:
        save_lora(aside, adapted, processor, about, card_of(about, f"{task}, extracted", facts, scores))
        forms = {"in memory": expected, "adapter from disk": load(aside, config.model, merge=False)[0]}
        forms["merged from disk"] = load(aside, config.model)[0]
        check(answers_of(task, forms), first_batches(task, data), config.tolerance, orders_queries(task, tuned))
    say(f"{folder_bytes(out):,} bytes, where the full fine-tune has {folder_bytes(folder):,}")
    print(out)


if __name__ == "__main__":
    cli(main)
