"""What --peft_method and --quantize stand for: PEFT's settings of each method, and a tower in 4 bits."""

import importlib

import torch
from torch import nn

from common.config import UserError
from common.runtime import import_fault


def adapter_config(method: str, config, targets: list[str]):
    """PEFT's settings of an adapter method, on these layers.

    lora       W + (alpha / r) B A                         Hu et al. 2021, arXiv:2106.09685
    dora       the same, direction and length of W apart   Liu et al. 2024, arXiv:2402.09353
    rslora     alpha / sqrt(r) in place of alpha / r       Kalajdzievski 2023, arXiv:2312.03732
    pissa      starts at W's largest singular vectors      Meng et al. 2024, arXiv:2404.02948
    olora      starts at W's QR decomposition              Buyukakyuz 2024, arXiv:2406.01775
    ia3        one factor a channel                        Liu et al. 2022, arXiv:2205.05638
    loha       Hadamard product of two low-rank products   Hyeon-Woo et al. 2021, arXiv:2108.06098
    lokr       Kronecker product of two small matrices     Yeh et al. 2023, arXiv:2309.14859

    PiSSA and OLoRA get no dropout: their A and B hold a part of W itself, which must not drop out.
    """
    from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig

    rank = max(1, config.lora_r)
    if method == "ia3":  # in the MLP it scales what goes into a layer, elsewhere what comes out
        return IA3Config(target_modules=targets, feedforward_modules=[name for name in targets if ".mlp." in name])
    if method in ("loha", "lokr"):
        kind = LoHaConfig if method == "loha" else LoKrConfig
        return kind(r=rank, alpha=config.lora_alpha, target_modules=targets)
    return LoraConfig(
        r=rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0 if method in ("pissa", "olora") else config.lora_dropout,
        target_modules=targets,
        use_dora=method == "dora",
        use_rslora=method == "rslora",
        init_lora_weights=method if method in ("pissa", "olora") else True,
    )


def quantized(model, quantize: str, device, method: str = "lora"):
    """The model with the linear layers of its tower's blocks in 4 bits (NF4, QLoRA: arXiv:2305.14314), or as it is with "none".

    They take an eighth of the memory and are read in bfloat16. UserError without a GPU or without bitsandbytes, and for a PEFT
    method that would have to change the weights or has no layer for such ones.
    """
    if quantize == "none":
        return model
    if method not in ("lora", "dora", "rslora"):
        raise UserError(f"--quantize 4bit goes with --peft_method lora, dora and rslora, not with {method}")
    if fault := import_fault("bitsandbytes.nn"):  # not in requirements.txt: it is of use on a GPU alone
        raise UserError(f"--quantize 4bit needs {fault}; or leave --quantize out")
    bnb = importlib.import_module("bitsandbytes.nn")
    if torch.device(device).type != "cuda":
        raise UserError(f"--quantize 4bit needs an NVIDIA GPU, and this run is on {device}; leave --quantize out")
    for name, layer in list(model.tower.named_modules()):
        if isinstance(layer, nn.Linear) and ".layers." in f".{name}":
            small = bnb.Linear4bit(
                layer.in_features,
                layer.out_features,
                layer.bias is not None,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
            )
            small.weight = bnb.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            small.bias = layer.bias
            parent, _, last = name.rpartition(".")
            setattr(model.tower.get_submodule(parent), last, small)
    model.is_loaded_in_4bit = True  # what PEFT looks for, to take its adapter for such layers
    return model.to(device)  # this is when the weights are quantized
