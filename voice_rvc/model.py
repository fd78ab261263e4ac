"""A voice as a model: where bases come from, speakers' rows, where adapters go, saving and loading; its discriminator."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch

from common.bases import base_source, fetch_file
from common.checkpoint import check_holds, fingerprint, open_model_folder, read_json, write_json
from common.config import Range, UserError
from common.folders import best_of
from common.own_adapters import add_own_adapter
from common.runtime import say
from common.saved_models import load_under, make_origin, open_checkpoint, take_over, with_saved_adapter
from common.schema import check_fields
from common.tensor_files import shapes_of
from discriminator import SMALL_PERIODS, V1_PERIODS, V2_PERIODS, Discriminator
from layers import to_old_names
from synthesizer import Synthesizer, VoiceConfig
from voice_files import (
    FILE_ENDINGS,
    OUR_KEY,
    VoiceFile,
    check_tensors,
    discriminator_of,
    expected_shapes,
    is_run_folder,
    newest_pair,
    read_discriminator,
    read_tensors,
    read_voice,
)

DEMO_BASE = Path(__file__).resolve().parent / "demo_base"
EXAMPLE = "lj1995/VoiceConversionWebUI/pretrained_v2/f0G40k.pth"
VOICE_FILE = "voice.json"
MODEL_FILE = "model.safetensors"
VOICE_FIELDS = {  # of voice.json, in the order of Voice's
    "content": Annotated[str, Range(1, 4096)],
    "f0_method": str,
    "speakers": list[str],
    "f0_medians": dict[str, Annotated[float, Range(1e-3, 1e5)]],
}
VOICE_ROWS = "emb_g"  # the table with a row for each speaker, which trains whole beside the adapters
# What --lora_targets may say -> a regular expression for full names of layers. The source's single weight and the last
# convolution have fewer numbers than an adapter; noise_convs bring in the pitch, which no speaker owns.
DECODER = r"dec\.(ups|resblocks)\..+"
LORA_PRESETS = {
    "decoder": DECODER,
    "default": rf"{DECODER}|dec\.(conv_pre|cond)|flow\..+|enc_p\..+",
    "attention": r"enc_p\.encoder\.attn_layers\..+",
    "all": r"(?!dec\.(m_source|conv_post)).+",
}
# Applio's names of content models -> those on the hub. RVC knows the first alone, under the name hubert_base.pt.
CONTENT_MODELS = {
    "contentvec": "lengyue233/content-vec-best",
    "chinese-hubert-base": "TencentGameMate/chinese-hubert-base",
    "japanese-hubert-base": "rinna/japanese-hubert-base",
    "korean-hubert-base": "team-lucid/hubert-base-korean",
}


@dataclass
class Voice:
    """What a voice is beside its weights.

    content: what its content features come from, "dsp" or "hubert:<name>". f0_method: by which its pitch was tracked.
    speakers: row i of the model's table is speakers[i]; empty where a file does not say. f0_medians: Hz, by speaker.
    """

    config: VoiceConfig
    content: str
    f0_method: str = "auto"
    speakers: list[str] = field(default_factory=list)
    f0_medians: dict[str, float] = field(default_factory=dict)

    @property
    def content_is_known(self) -> bool:
        """Whether its content model is one of those that all voices use: any other is fetched only where --content names it."""
        return self.content.removeprefix("hubert:") in CONTENT_MODELS.values()

    def to_json(self) -> dict:
        return {key: value for key, value in vars(self).items() if key != "config"}

    @classmethod
    def from_json(cls, data, config: VoiceConfig) -> "Voice":
        """What to_json gave. UserError for what it never gives."""
        check_fields(data, VOICE_FIELDS, "the description of a voice")
        if (many := len(data["speakers"])) > config.speakers:
            raise UserError(f"the description of a voice names {many} speakers, and the model has {config.speakers} rows")
        return cls(config, *(data[key] for key in VOICE_FIELDS))

    def save_pretrained(self, folder: Path) -> None:
        write_json(Path(folder) / VOICE_FILE, self.to_json())

    @classmethod
    def load(cls, folder: Path, config: VoiceConfig | None = None) -> "Voice":
        """Of a checkpoint folder. config: that of the base, for an adapter's folder, which has none. UserError if damaged."""
        folder = Path(folder)
        try:
            config = config or VoiceConfig.from_json(read_json(folder / "config.json"))
            return cls.from_json(read_json(folder / VOICE_FILE), config)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None


# ---- bases -----------------------------------------------------------------------------------------------------------


def load_base(name: str, download: bool = True):
    """(Synthesizer in eval mode, Voice, {"name", "sha256"}) of a base.

    name: demo; a folder of ours; a .pth of RVC or Applio, for training or for conversion alone; a training folder of theirs; or
    such a file on the hub, owner/repo/path/f0G40k.pth. UserError where it is none of these, or damaged.
    """
    place = Path(name).expanduser()
    if place.name == MODEL_FILE and (place.parent / VOICE_FILE).is_file():
        name, place = str(place.parent), place.parent
    if place.is_dir() and is_run_folder(place):
        _, found = newest_pair(place)
        voice = voice_of(found)
    elif place.is_file() or (name.endswith(FILE_ENDINGS) and not place.is_dir()):
        found = read_voice(locate(name, download))
        voice = voice_of(found)
    else:
        found, voice = read_folder(Path(base_source(name, DEMO_BASE, EXAMPLE, download)))
    model = Synthesizer(found.config, found.with_enc_q)
    model.load_state_dict(found.tensors)  # torch's own hook takes the old names
    model.eval().facts = {"speakers": voice.speakers, "optimizer": found.facts.get("optimizer", False)}
    kind = f"{'v1' if found.config.content_width == 256 else 'v2'}, " * (voice.content != "dsp")
    about = f"{kind}{found.config.sample_rate} Hz, {'with' if found.config.f0 else 'without'} F0"
    about += "" if found.with_enc_q else ", for conversion alone (no enc_q)"
    say(f"base: {name}, RVC synthesizer ({about}), {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    name = str(place.resolve()) if name != "demo" and place.exists() else name  # an adapter finds its base from any folder
    return model, voice, {"name": name, "sha256": voice_fingerprint(model)}


def voice_fingerprint(model: Synthesizer) -> str:
    """sha256 of what converts: the same for a training file and the small one that was made of it, whatever names they use."""
    return fingerprint({name: tensor for name, tensor in model.state_dict().items() if not name.startswith("enc_q.")})


def locate(name: str, download: bool, flag: str = "--model ") -> Path:
    """The file of a voice by its name; one on the hub, owner/repo/path/file, is fetched. UserError where there is none."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") < 2:
        raise UserError(f"{flag}{name}: there is no file of that name; give a .pth, or one on the hub ({EXAMPLE})")
    return fetch_file(name, download, flag)


def read_folder(folder: Path) -> tuple[VoiceFile, Voice]:
    """A voice that was saved here: a run, its checkpoint, or the demo's base. UserError unless it is one, and whole."""
    folder = best_of(folder)
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds an adapter, which is no base: --start_from goes on with it")
    folder = open_model_folder(folder, MODEL_FILE) if (folder / "manifest.json").exists() else folder
    check_holds(folder, MODEL_FILE)
    voice = Voice.load(folder)
    tensors, _ = read_tensors(folder / MODEL_FILE)
    check_tensors(folder / MODEL_FILE, expected_shapes(voice.config, "enc_q.pre.weight" in tensors), tensors)
    return VoiceFile(voice.config, {name: tensor.float() for name, tensor in tensors.items()}, {}), voice


def voice_of(file: VoiceFile) -> Voice:
    """What a file of others says of its voice; what is left unsaid is as RVC has it."""
    if isinstance(file.facts.get(OUR_KEY), dict):
        return Voice.from_json(file.facts[OUR_KEY].get("voice"), file.config)
    embedder = file.facts.get("embedder_model")
    embedder = embedder if isinstance(embedder, str) and embedder else "contentvec"
    return Voice(file.config, f"hubert:{CONTENT_MODELS.get(embedder, embedder)}")


def with_voices(base: Synthesizer, voice: Voice) -> Synthesizer:
    """The base, to be trained on the speakers of `voice`: rows 0, 1, ... of its table are theirs.

    A speaker whom the base knows by name brings the row along; others start between the speakers that it knows, at their mean,
    or, where it names none, at the rows as they are. UserError for more speakers than rows, and for a base that cannot train.
    """
    if base.enc_q is None:
        raise UserError(
            "--model is a voice for conversion alone: it lacks the posterior encoder (enc_q), without which nothing trains; take "
            "the G_*.pth that it was made of, or a pretrained f0G*.pth"
        )
    if base.facts.get("optimizer"):
        say("note: the optimizer's state in it is not taken, for programs order it differently: training starts with a new one")
    rows, known = base.emb_g.weight.data, base.facts.get("speakers", [])
    if len(voice.speakers) > len(rows):
        raise UserError(f"the data has {len(voice.speakers)} speakers, and the base has rows for {len(rows)}")
    if known:
        old = rows.clone()
        places = {name: i for i, name in enumerate(known)}
        for i, name in enumerate(voice.speakers):
            rows[i] = old[places[name]] if name in places else old[: len(known)].mean(0)
    base.facts = {"speakers": list(voice.speakers)}
    base.new_layers = [VOICE_ROWS]
    return base


def load_discriminator(name: str, base: str, config: VoiceConfig) -> Discriminator:
    """The discriminator that `name` says; "": the one beside the base (f0D40k.pth, D_100.pth), or else a new one."""
    path = discriminator_file(name, base)
    if path is None:
        say("discriminator: new, since none lies beside the base; the first epochs teach it what a voice is")
        small = config.hidden_channels < VoiceConfig.hidden_channels
        return Discriminator(SMALL_PERIODS, 1 / 16) if small else Discriminator()
    tensors = read_discriminator(path)
    networks = len({name.split(".")[1] for name in tensors})
    periods = next((known for known in (V1_PERIODS, SMALL_PERIODS) if len(known) + 1 == networks), V2_PERIODS)
    widest = max(tensor.shape[0] for tensor in tensors.values() if tensor.ndim)
    model = Discriminator(periods, width=min(widest, 1024) / 1024)
    expected = shapes_of(to_old_names(model.state_dict()))
    check_tensors(path, expected, tensors)
    model.load_state_dict(tensors)
    say(f"discriminator: {path.name}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    return model


def discriminator_file(name: str, base: str) -> Path | None:
    """Where a discriminator is read from; None where there is none. UserError where the named one is missing."""
    if name:
        return locate(name, download=True, flag="--discriminator ")
    path = Path(base).expanduser()
    if path.is_dir() and is_run_folder(path):
        path, _ = newest_pair(path)
        return path.with_name(discriminator_of(path.name))
    if path.is_file():
        other = path.with_name(discriminator_of(path.name) or path.name)
        return other if other != path and other.is_file() else None
    other = discriminator_of(base)
    return fetch_file(other) if other and base.count("/") >= 2 else None


# ---- adapters --------------------------------------------------------------------------------------------------------


def add_lora(model: Synthesizer, config) -> Synthesizer:
    """The model with adapters as config.lora_* ask for, frozen but for these and the speakers' rows, which train whole."""
    if config.lora_last_k:
        raise UserError("--lora_last_k is not for voices, whose layers are not one after the other: --lora_targets chooses")
    return add_own_adapter(model, config, LORA_PRESETS, (VOICE_ROWS,), answer)


def answer(model: Synthesizer) -> torch.Tensor:
    """All that the losses are made of, for a second's tenth of noise, in one row; for a voice without enc_q the wave alone."""
    config, device, frames = model.config, next(model.parameters()).device, 10
    torch.manual_seed(0)  # common/trial.py restores the generator
    phone = torch.randn(1, frames, config.content_width).to(device)
    spec = torch.rand(1, config.n_fft // 2 + 1, frames).to(device)
    lengths, sid = torch.tensor([frames], device=device), torch.zeros(1, dtype=torch.long, device=device)
    f0 = torch.full((1, frames), 200.0, device=device) if config.f0 else None
    pitch = torch.full((1, frames), 100, device=device) if config.f0 else None
    if model.enc_q is None:
        return model.eval().infer(phone, lengths, pitch, f0, sid).flatten()
    out = model.eval()(phone, lengths, pitch, f0, spec, sid)
    return torch.cat([part.flatten() for part in (out.wave, out.z_p, out.m_p, out.logs_p, out.m_q, out.logs_q)])


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def origin(method: str, model: Synthesizer, base: dict, config, voice: Voice) -> dict:
    """What origin.json says of a checkpoint; what the voice is stands in voice.json."""
    return make_origin("voice_rvc", method, base, config, speakers=config.speakers, sample_rate=voice.config.sample_rate)


def origin_of_others(base: dict) -> dict:
    """The same for a voice that other programs made, of which nothing more is known. base: what load_base says of it."""
    return {"task": "voice_rvc", "method": "full", "base": base, "data_dir": "", "batch_size": 1, "seed": 0}


def load_checkpoint(folder: Path | str, base: str | tuple = "", merge: bool = True, device="cpu"):
    """(Synthesizer in eval mode on the device, Voice, origin) of a checkpoint, full or an adapter, or of a .pth of others.

    base: an adapter's base, if not under its recorded name; or what load_base gave. merge: add the adapter into its weights.
    """
    place = Path(folder).expanduser()
    if place.is_file() or (place.is_dir() and is_run_folder(place)):
        model, voice, facts = load_base(str(place))
        return model.to(device), voice, origin_of_others(facts)
    folder, about = open_checkpoint(folder, "voice_rvc")
    model, voice = load_under(folder, about, load_base, base)
    if about["method"] != "full":
        voice = Voice.load(folder, model.config)
        model = with_saved_adapter(model, folder, (VOICE_ROWS,), merge, answer, own_layers=True)
    model.facts = {"speakers": voice.speakers}
    return model.eval().to(device), voice, about


def start_from(folder: str, model: Synthesizer) -> None:
    """The weights of a checkpoint for `model`, as it is about to train; "": none. Rows, too, if the speakers are the same."""
    if folder:
        saved, voice, about = load_checkpoint(folder, merge=False)
        same = voice.speakers == model.facts["speakers"]
        take_over(model, saved, about, folder, () if same else (VOICE_ROWS,))


def card_code(about: dict) -> dict:
    """What a model card says of loading, for Run.card: no library alone does it; RVC and Applio take what is exported."""
    base = "" if about["method"] == "full" else " --model path/to/the/base"
    return {
        "use": f"""wave, rate = predictor.predict("speech.wav")

# For RVC WebUI and Applio: python scripts/rvc_checkpoint.py export path/to/this/folder voice.pth{base}"""
    }
