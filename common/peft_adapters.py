"""Adapters on any model through PEFT: adding them, the fast forward, merging, saving and loading strictly.

What relies on PEFT's internals is here, and tests/test_peft_adapters.py says which of it broke.
"""

import json
import re
import tempfile
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn

from common.checkpoint import read_json
from common.config import UserError, shown
from common.fast_lora import conv_pays, lora_conv, lora_linear
from common.lora import ADAPTER_FILE, is_within, replace_modules
from common.lora_files import HARMLESS_STARTS, plain_names
from common.lora_targets import CONVOLUTIONS
from common.runtime import say
from common.tensor_files import is_finite, load_tensors, misfit, shapes_of
from common.trial import keeps_answers

SPLIT_STARTS = ("pissa", "olora")  # of init_lora_weights: A and B start as a part of the base's weights, which keep the rest
MAX_ALPHA = 10**6  # beyond it an output overflows
# Parts of layer names of ViT and its relatives today, and as transformers 4 had them (some kept those well into 5).
OLD_NAMES = (
    (".layers.", ".encoder.layer."),
    (".attention.q_proj", ".attention.attention.query"),
    (".attention.k_proj", ".attention.attention.key"),
    (".attention.v_proj", ".attention.attention.value"),
    (".attention.q_proj", ".attention.self.query"),  # Swin
    (".attention.k_proj", ".attention.self.key"),
    (".attention.v_proj", ".attention.self.value"),
    (".attention.o_proj", ".attention.output.dense"),
    (".mlp.fc1", ".intermediate.dense"),
    (".mlp.fc2", ".output.dense"),
)


# ---- adding ----------------------------------------------------------------------------------------------------------


def add_adapter(model, adapter, whole=(), frozen_dtype: str = "fp32"):
    """The PEFT model of a base: frozen, but for the adapter and the parts in `whole` (heads).

    adapter: PEFT's settings (LoraConfig ...). Where they name no layer there is no adapter to add, and the model itself comes
    back, of which `whole` trains alone. What was frozen before stays so. frozen_dtype: see `store_frozen_in_bf16`. Plain LoRA
    layers compute by common/fast_lora.py from here on; what is saved is the same.
    """
    from peft import get_peft_model

    unused = [p for p in model.parameters() if not p.requires_grad]
    model.whole = tuple(whole)  # saved in full, unused or not
    model = get_peft_model(without_word_embeddings(model), adapter) if adapter.target_modules else model.requires_grad_(False)
    train_whole(model, whole)
    for parameter in unused:
        parameter.requires_grad_(False)
    if frozen_dtype == "bf16":
        store_frozen_in_bf16(model)
    return with_fast_layers(model)


def without_word_embeddings(model):
    """PEFT looks for layers that share weights with the word embeddings; some vision models of transformers raise when asked."""
    try:
        getattr(model, "get_input_embeddings", nn.Identity)()
    except NotImplementedError:
        model.get_input_embeddings = nn.Identity
    return model


def store_frozen_in_bf16(model) -> None:
    """Frozen matrices and kernels in half the memory, for training under bf16 autocast (--precision bf16).

    Outputs and gradients stay as they were, to the bit: autocast rounds these very weights at every use, and so need not any
    more. Norms, embeddings, biases and all that trains stay float32.
    """
    size = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if type(module) in (nn.Linear, *CONVOLUTIONS) and not weight.requires_grad:
            module.weight.data = weight.data.bfloat16()
            size += weight.numel()
    on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    say(f"{size:,} frozen weights are kept in bf16" + ("; that saves time on few CPUs, memory on all" if on_cpu else ""))


def with_fast_layers(model):
    """The PEFT model, its plain LoRA layers on the fast forward by an attribute of each: `del layer.forward` undoes it."""
    from peft.tuners.lora import layer as peft_layers

    kinds = (peft_layers.Linear, peft_layers.Conv1d, peft_layers.Conv2d, peft_layers.Conv3d)
    for layer in model.modules():
        if type(layer) in kinds:
            layer.forward = partial(fast_forward, layer)  # unlike a closure, it follows its layer through deepcopy and pickle
    return model


def fast_forward(layer, x, *args, **kwargs):
    """A PEFT layer's forward: one function of common/fast_lora.py, or PEFT's own where that does not cover the case."""
    parts = None if args or kwargs else plain_lora(layer, x)
    if parts and type(layer.base_layer) is nn.Linear:
        return lora_linear(x, *parts)
    if parts and x.dim() == parts[0].dim() and conv_pays(x, layer.base_layer):
        return lora_conv(x, *parts, layer.base_layer.stride, layer.base_layer.padding)
    return type(layer).forward(layer, x, *args, **kwargs)


def plain_lora(layer, x):
    """(weight, bias, A, B, scaling) if W x + b + scaling B A x is all that the layer computes on x now, else None.

    Not with several adapters, or disabled or merged ones; DoRA and its kin; active dropout; bases that train, are quantized or
    parametrized, or are convolutions with groups, dilation or another padding than zeros; hooks; mixed dtypes without autocast.
    """
    base, names = layer.base_layer, layer.active_adapters
    if layer.disable_adapters or layer.merged or len(names) != 1 or names[0] not in layer.lora_A or layer.lora_variant:
        return None
    down, up, dropout = layer.lora_A[names[0]], layer.lora_B[names[0]], layer.lora_dropout[names[0]]
    if type(base) not in (nn.Linear, *CONVOLUTIONS) or not type(base) is type(down) is type(up) or up.bias is not None:
        return None
    if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in (base, down, up)):
        return None
    if type(dropout) is not nn.Identity and not (type(dropout) is nn.Dropout and not dropout.training):
        return None
    if type(base) is not nn.Linear and not is_plain_convolution(base):
        return None
    tensors = (base.weight, base.bias, down.weight, up.weight)
    frozen = not base.weight.requires_grad and (base.bias is None or not base.bias.requires_grad)
    of_one_dtype = torch.is_autocast_enabled(x.device.type) or all(t is None or t.dtype == x.dtype for t in tensors)
    if not frozen or not of_one_dtype or any(type(t) not in (nn.Parameter, type(None)) for t in tensors):
        return None
    return *tensors, layer.scaling[names[0]]


def is_plain_convolution(conv) -> bool:
    plain = conv.groups == 1 and set(conv.dilation) == {1} and conv.padding_mode == "zeros"
    return plain and not isinstance(conv.padding, str)


@torch.no_grad()
def merged(model, answer):
    """The plain model with the adapter of a PEFT model added into its weights, where that leaves its outputs as they are.

    answer: as in common/trial.py; it is compared before and after. Else the model with its adapter beside it, and a line that
    says so: a weight-standardised convolution normalises its weight anew, and with it what was added.
    """
    if keeps_answers(model, answer, model.merge_adapter, model.unmerge_adapter):
        return model.unload()
    return model.get_base_model()


@torch.no_grad()
def merge_layers(model):
    """The model, out of its PeftModel, with the adapter of each layer in the weights and no trace of it beside them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.merge()
        vars(layer).pop("forward", None)  # of with_fast_layers: it refers to its layer, and would keep it in memory
    replace_modules(model, {layer: layer.get_base_layer() for layer in layers})
    return model


def train_whole(model, parts) -> None:
    """Unfreezes the parts of a PEFT model with these names (heads), to train beside the adapter."""
    for name, parameter in model.named_parameters():
        if is_within(name, parts):
            parameter.requires_grad_(True)


# ---- saving and loading ----------------------------------------------------------------------------------------------


def adapter_state(model) -> dict:
    """All that trained, by PEFT's names: the adapter's tensors, and the layers (heads) that train whole beside them."""
    from peft import get_peft_model_state_dict

    whole = {f"base_model.model.{name}": t for name, t in whole_tensors(model.get_base_model()).items()}
    return {**get_peft_model_state_dict(model, save_embedding_layers=False), **whole}


def whole_tensors(model) -> dict:
    """The parameters in the parts that train whole, by their names in the model; add_adapter has noted which parts."""
    return {name: p.detach() for name, p in model.named_parameters() if is_within(name, getattr(model, "whole", ()))}


def save_adapter_files(model, folder: Path) -> None:
    """Writes a PEFT adapter folder; PeftModel.from_pretrained(base, folder) gives the trained model back.

    PEFT itself saves the adapter only (or wraps a head in a second copy, `modules_to_save`, which breaks heads whose
    weights are shared between layers). Its loader takes further keys of the model as they are, so the heads go into the
    same file under their own names.
    """
    from safetensors.torch import save_file

    config = model.peft_config["default"]
    config.target_modules = sorted(config.target_modules)  # a set, which PEFT would write in another order in every process
    model.save_pretrained(folder, save_embedding_layers=False)
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in adapter_state(model).items()}, folder / ADAPTER_FILE)


@contextmanager
def in_names_of_today(folder: Path, model):
    """Yields the adapter folder, or a copy of it in which layers go by the names of today, if it was saved under older ones.

    transformers 5 renamed the layers of ViT and its relatives (query became q_proj); it converts checkpoints, but not adapters.
    The copy asks for all layers that the original asked for, so that loading misses what the file lacks. What cannot be
    translated is yielded as it is, and loading says what is wrong with it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    try:
        tensors = load_file(folder / ADAPTER_FILE)
    except (OSError, SafetensorError):
        tensors = {}
    layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    today = {old: name for name in layers for old in former_names(name)}
    names = {}
    for key in tensors:
        layer, mark, matrix = key.removeprefix("base_model.model.").partition(".lora_")
        names[key] = f"base_model.model.{today.get(layer, layer)}{mark}{matrix}" if mark else key
    config = read_json(folder / "adapter_config.json") if any(key != name for key, name in names.items()) else {}
    config = config if isinstance(config, dict) else {}
    targets = config.get("target_modules")
    by_layer = config.get("rank_pattern") or config.get("alpha_pattern")  # these name layers, too, and are not translated
    if not isinstance(targets, list) or by_layer or len(set(names.values())) < len(names):
        yield folder
        return
    wanted = sorted({name for old, name in today.items() if any(f".{old}".endswith(f".{target}") for target in targets)})
    say(f"the adapter in {folder} has layer names of an older transformers; they are translated")
    with tempfile.TemporaryDirectory() as aside:
        save_file({names[key]: tensor for key, tensor in tensors.items()}, Path(aside) / ADAPTER_FILE)
        text = json.dumps({**config, "target_modules": wanted, "modules_to_save": None})
        (Path(aside) / "adapter_config.json").write_text(text, encoding="utf-8")
        yield Path(aside)


def former_names(name: str) -> set[str]:
    """All names that a layer may have had, today's among them."""
    names = {name}
    for new, old in OLD_NAMES:
        names |= {former.replace(new, old) for former in names}
    return names


def check_adapter_config(folder: Path, tensors: dict) -> None:
    """UserError for settings that PEFT would take at their word: patterns that may run for hours, ranks that eat the memory.

    A file of ours names each layer in full, and has tensors of the rank that it names.
    """
    file, config = folder / "adapter_config.json", read_json(folder / "adapter_config.json")
    if not isinstance(config, dict):
        raise UserError(f"{file} holds no settings")
    for key in ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save"):
        names = config.get(key) or []
        if not isinstance(names, list) or not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+", name) for name in names):
            raise UserError(f"{file}: {key} must be a list of names; patterns of a file are not run")
    for key in ("layers_pattern", "layers_to_transform", "layer_replication", "target_parameters", "trainable_token_indices"):
        if config.get(key):
            raise UserError(f"{file} asks for {key}, which is more than an adapter on named layers")
    start = config.get("init_lora_weights")
    if start not in (*HARMLESS_STARTS, *SPLIT_STARTS):  # pissa_niter_99999999 takes hours
        raise UserError(f"{file}: init_lora_weights is {shown(start)}, which is not known here")
    alphas = {key: config[key] for key in ("lora_alpha", "alpha") if key in config}
    for key, alpha in {**alphas, **plain_names(config.get("alpha_pattern"))}.items():
        if type(alpha) not in (int, float) or not abs(alpha) <= MAX_ALPHA:
            raise UserError(f"{file}: the alpha {key} is {shown(alpha)[:20]}, but must be a number of at most {MAX_ALPHA}")
    ranks = {"r": config.get("r"), **plain_names(config.get("rank_pattern"))}
    sizes = {size for tensor in tensors.values() for size in tensor.shape}
    for key, rank in ranks.items():
        if config.get("peft_type") in ("LORA", "LOHA") and (type(rank) is not int or rank not in sizes):
            raise UserError(f"{file}: the rank {key} is {str(rank)[:20]}, and no tensor beside it is of that rank")


def load_adapter_files(model, folder: Path, whole=()):
    """The base `model` with the adapter of `folder` on it, in eval mode; whole: the parts that trained whole.

    UserError unless every tensor of the file finds its place and every place gets its tensor.
    """
    from peft import PeftModel, get_peft_model_state_dict

    with in_names_of_today(folder, model) as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of missing tensors; here they are an error, below
        saved = load_tensors(place / ADAPTER_FILE)
        if broken := sorted(name for name, tensor in saved.items() if not is_finite(tensor)):
            raise UserError(f"{folder / ADAPTER_FILE}: numbers that are not finite in {broken[0]} ({len(broken)} in all)")
        check_adapter_config(place, saved)
        try:
            model = PeftModel.from_pretrained(without_word_embeddings(model), place)
        except Exception as error:  # whatever PEFT makes of settings that it did not write
            raise UserError(f"the adapter in {folder} does not fit this base: {' '.join(str(error).split())[:300]}") from None
    parameters = model.get_base_model().named_parameters()  # a bias beside an adapter is base_layer.bias by now
    peft_copies = ("modules_to_save", "original_module")  # of a part that trained whole by PEFT's own means; it names them, below
    expected = {
        f"base_model.model.{name}": tuple(p.shape)
        for name, p in parameters
        if is_within(name, whole) and not any(part in peft_copies for part in name.split("."))
    }
    expected |= shapes_of(get_peft_model_state_dict(model, save_embedding_layers=False))
    if wrong := misfit(expected, saved):
        raise UserError(f"{folder / ADAPTER_FILE} does not fit this base: {wrong}")
    return with_fast_layers(model).eval()
