"""Small voices in the official architectures, and files of them as RVC and Applio write them.

from voice_toys import small_voice, rvc_file
"""

import torch

from layers import WEIGHT_NORM_NAMES, to_old_names
from synthesizer import Synthesizer, VoiceConfig

NARROW = {
    "inter_channels": 8,
    "hidden_channels": 8,
    "filter_channels": 16,
    "n_layers": 1,
    "resblock_kernels": (3,),
    "resblock_dilations": ((1, 3, 5),),
    "upsample_initial": 32,
    "speakers": 3,
    "gin_channels": 4,
}


def narrow(rate=40000, version="v2", f0=True, **changes) -> VoiceConfig:
    """An official architecture with a few channels."""
    return VoiceConfig(**{**vars(VoiceConfig.of_rate(rate, version, f0)), **NARROW, **changes})


def small_voice(config=None, seed=0, with_enc_q=True) -> Synthesizer:
    """A voice whose every weight counts, also those that start at zero."""
    torch.manual_seed(seed)
    model = Synthesizer(config or narrow(), with_enc_q)
    for layer in model.flow.flows[::2]:
        torch.nn.init.normal_(layer.post.weight, std=0.2)
    return model.eval()


def old_weights(model, enc_q=True, half=False) -> dict:
    state = {name: t.detach().clone() for name, t in to_old_names(model.state_dict()).items()}
    return {name: t.half() if half else t for name, t in state.items() if enc_q or not name.startswith("enc_q.")}


def to_new_names(state: dict) -> dict:
    """A state dict by torch's names within a model, as Applio has it in memory. Names that are new already stay."""
    for new, old in WEIGHT_NORM_NAMES.items():
        state = {name.removesuffix(old) + new if name.endswith(old) else name: value for name, value in state.items()}
    return state


def listed(config) -> list:
    """The 18 items by which RVC builds a model."""
    return [
        *(config.n_fft // 2 + 1, 32, config.inter_channels, config.hidden_channels, config.filter_channels),
        *(config.n_heads, config.n_layers, config.kernel_size, 0, config.resblock, list(config.resblock_kernels)),
        *([list(row) for row in config.resblock_dilations], list(config.upsample_rates), config.upsample_initial),
        *(list(config.upsample_kernels), config.speakers, config.gin_channels, config.sample_rate),
    ]


def rvc_file(model, **changes) -> dict:
    """What RVC WebUI shares: half precision, no posterior encoder."""
    config = model.config
    facts = {"config": listed(config), "info": "20epoch", "sr": f"{config.sample_rate // 1000}k", "f0": int(config.f0)}
    return {"weight": old_weights(model, enc_q=False, half=True), **facts, "version": config.version, **changes}


def applio_file(model) -> dict:
    facts = {"epoch": 20, "step": 400, "model_name": "v", "embedder_model": "contentvec", "speakers_id": 1, "vocoder": "HiFi-GAN"}
    return rvc_file(model, sr=model.config.sample_rate, f0=bool(model.config.f0), **facts)


def training_state(model) -> dict:
    """A G_*.pth, which has no configuration."""
    return {"model": old_weights(model), "iteration": 20, "optimizer": {"state": {}, "param_groups": []}, "learning_rate": 1e-4}


def converted(model) -> torch.Tensor:
    """A tenth of a second of noise, converted."""
    config = model.config
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        phone, lengths, sid = torch.randn(1, 10, config.content_width), torch.tensor([10]), torch.tensor([1])
        pitch, f0 = (torch.full((1, 10), 90), torch.full((1, 10), 180.0)) if config.f0 else (None, None)
        return model.infer(phone, lengths, pitch, f0, sid)
