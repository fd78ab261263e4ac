"""The RVC synthesizer: content features and F0 -> a wave in a speaker's voice. v1 and v2, with and without F0, any rate.

Five parts, by the names of the official checkpoints: enc_p (content and pitch -> the distribution of the latent without its
speaker), enc_q (spectrogram -> latent; for training alone), flow (latent <-> latent without its speaker), dec (latent and F0 ->
wave), emb_g (a row for each speaker). B clips, T frames of 10 ms, hop samples a frame. Architecture: VITS (arXiv:2106.06103)
with HiFi-GAN's decoder (2010.05646) driven by a harmonic source (NSF, 1904.12088), as RVC v2 arranges them.

Random numbers that are not given come from torch's global generator.
"""

import math
import typing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from common.checkpoint import write_json
from common.config import Range, UserError, convert, field_kinds, shown
from layers import LEAK, Coupling, Flip, ResBlock1, ResBlock2, Transformer, WaveNet, in_tiles, sequence_mask, to_old_names

PITCH_STEPS = 256  # of coarse pitch: 0 is nothing, 1 unvoiced, 255 the highest
SINE_LEVEL = 0.1  # of the harmonic source
VOICED_NOISE = 0.003  # noise beside the sine; unvoiced frames have SINE_LEVEL / 3 of noise and no sine
SOURCE_GAIN = 5.0  # the source's weight before training. By chance it may be near 0 beside a bias near 1: tanh then stands still,
#                    the decoder hears no pitch, and after 900 steps still hums at the frame rate. RVC's files replace it.
NOISE = 0.66666  # how far a conversion strays from the mean, in standard deviations

Width = Annotated[int, Range(1, 4096)]
Widths = tuple[Annotated[int, Range(1, 512)], ...]


@dataclass(frozen=True)
class VoiceConfig:
    """The architecture, and the spectrogram that it is trained on; as it stands: 40k v2. UserError for what cannot be built.

    Channels, but: sample_rate in Hz; n_fft, hop and win in samples; kernels in frames (upsample_kernels in outputs);
    segment_frames: what the decoder makes of each clip in training. content_width 768 is v2, 256 v1.
    """

    sample_rate: Annotated[int, Range(4000, 192000)] = 40000
    n_fft: Annotated[int, Range(16, 16384)] = 2048
    hop: Annotated[int, Range(4, 4096)] = 400
    win: Annotated[int, Range(16, 16384)] = 2048
    mels: Annotated[int, Range(4, 512)] = 125
    content_width: Width = 768
    f0: bool = True
    inter_channels: Width = 192
    hidden_channels: Width = 192
    filter_channels: Width = 768
    n_heads: Annotated[int, Range(1, 64)] = 2
    n_layers: Annotated[int, Range(1, 64)] = 6
    kernel_size: Annotated[int, Range(1, 31)] = 3
    p_dropout: Annotated[float, Range(0, 0.95)] = 0.0
    resblock: Literal["1", "2"] = "1"
    resblock_kernels: Widths = (3, 7, 11)
    resblock_dilations: tuple[Widths, ...] = ((1, 3, 5),) * 3
    upsample_rates: Widths = (10, 10, 2, 2)
    upsample_initial: Width = 512
    upsample_kernels: Widths = (16, 16, 4, 4)
    speakers: Annotated[int, Range(1, 100_000)] = 109
    gin_channels: Width = 256
    segment_frames: Annotated[int, Range(1, 10_000)] = 32

    def __post_init__(self):
        for name, kind in field_kinds(type(self)).items():
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, convert_nested(kind, value))
            except ValueError as error:
                raise UserError(f"voice: {name} is {shown(value)}, but must be {error}") from None
        for fits, must in self.rules():
            if not fits:
                raise UserError(f"voice: {must}")

    def rules(self):
        """(whether it holds, what must hold), for what numbers must be together."""
        stages, rates, kernels = len(self.upsample_rates), self.upsample_rates, self.upsample_kernels
        pairs = list(zip(rates, kernels, strict=False))
        yield len(kernels) == stages, f"{stages} upsample_rates need as many upsample_kernels, not {len(kernels)}"
        yield self.hop == math.prod(rates), f"hop is {self.hop}, but must be the product of upsample_rates {list(rates)}"
        yield all(k >= u and (k - u) % 2 == 0 for u, k in pairs), "each upsampling kernel must be its rate plus an even number"
        yield (
            self.upsample_initial % 2**stages == 0,
            f"upsample_initial must be a multiple of {2**stages}, to halve {stages} times",
        )
        even = all(math.prod(rates[i:]) % 2 == 0 for i in range(1, stages))
        yield even or not self.f0, "the products of the last upsample_rates must be even, for the source's strides"
        same = len(self.resblock_kernels) == len(self.resblock_dilations)
        yield same, f"{len(self.resblock_kernels)} resblock_kernels need as many resblock_dilations"
        odd = all(k % 2 for k in (self.kernel_size, *self.resblock_kernels))
        yield odd, "kernel_size and resblock_kernels must be odd, to keep the length"
        yield self.hidden_channels % self.n_heads == 0, f"hidden_channels must be a multiple of n_heads {self.n_heads}"
        yield self.inter_channels % 2 == 0, "inter_channels must be even, for the flow halves them"
        yield self.win <= self.n_fft, f"win is {self.win}, but must be at most n_fft {self.n_fft}"
        yield self.hop <= self.n_fft, f"hop is {self.hop}, but must be at most n_fft {self.n_fft}"

    @property
    def bins(self) -> int:
        """Of the linear spectrogram."""
        return self.n_fft // 2 + 1

    @property
    def version(self) -> str:
        return "v1" if self.content_width == 256 else "v2"

    @classmethod
    def of_rate(cls, rate: int, version: str = "v2", f0: bool = True) -> "VoiceConfig":
        """The official configuration: rate 32000, 40000 or 48000, version v1 or v2. UserError for others."""
        if (rate, version) not in OFFICIAL:
            raise UserError(f"RVC has no {version} at {rate} Hz; there are 32000, 40000 and 48000 Hz in v1 and v2")
        n_fft, mels, rates, kernels, frames = OFFICIAL[rate, version]
        spectrum = {"sample_rate": rate, "n_fft": n_fft, "win": n_fft, "hop": math.prod(rates), "mels": mels}
        width = {"v1": 256, "v2": 768}[version]
        decoder = {"upsample_rates": rates, "upsample_kernels": kernels, "segment_frames": frames}
        return cls(**spectrum, content_width=width, f0=f0, **decoder)

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict) -> "VoiceConfig":
        """What to_json gave. UserError for keys that are not known or not there, and values that do not fit."""
        kinds = field_kinds(cls)
        if not isinstance(data, dict) or data.keys() != kinds.keys():
            odd = sorted(map(str, set(data) ^ set(kinds))) if isinstance(data, dict) else [shown(data)]
            raise UserError(f"voice: the configuration must have {', '.join(kinds)}; missing or unknown: {shown(odd)}")
        return cls(**data)


# (rate, version) -> n_fft, mels, upsample_rates, upsample_kernels, segment_frames
OFFICIAL = {
    (32000, "v2"): (1024, 80, (10, 8, 2, 2), (20, 16, 4, 4), 40),
    (40000, "v2"): (2048, 125, (10, 10, 2, 2), (16, 16, 4, 4), 32),
    (48000, "v2"): (2048, 128, (12, 10, 2, 2), (24, 20, 4, 4), 36),
    (32000, "v1"): (1024, 80, (10, 4, 2, 2, 2), (16, 16, 4, 4, 4), 40),
    (40000, "v1"): (2048, 125, (10, 10, 2, 2), (16, 16, 4, 4), 32),
    (48000, "v1"): (2048, 128, (10, 6, 2, 2, 2), (16, 16, 4, 4, 4), 24),
}


def convert_nested(kind, value):
    """common.config's `convert`, for tuples as well: of 1 to 16 values of a kind."""
    if typing.get_origin(kind) is not tuple:
        return convert(kind, value)
    if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= 16:
        raise ValueError("a list of 1 to 16 values")
    return tuple(convert_nested(typing.get_args(kind)[0], each) for each in value)


class TrainOutput(NamedTuple):
    """What a training step compares. S: frames of the slices, segment_frames or fewer where all clips are shorter."""

    wave: torch.Tensor  # (B, 1, S * hop), silent on padding
    starts: torch.Tensor  # (B,) first frame of each slice
    mask: torch.Tensor  # (B, 1, T), 1 within a clip
    z_p: torch.Tensor  # (B, inter, T) the posterior's sample, through the flow
    m_p: torch.Tensor  # means and logarithms of standard deviations: the prior's, by content and pitch,
    logs_p: torch.Tensor
    m_q: torch.Tensor  # and the posterior's, by the spectrogram
    logs_q: torch.Tensor


class Excitation(NamedTuple):
    """What is random in a conversion, and where its sine starts, so that chunks can be parts of one whole."""

    latent: torch.Tensor  # (B, inter, T) standard normal
    source: torch.Tensor  # (B, 1, T * hop) standard normal
    turns: torch.Tensor  # (B,) the sine's phase before the first sample, in turns: `source_turns` of what came before, mod 1


def source_turns(f0, hop: int, rate: int) -> torch.Tensor:
    """(B, T) Hz -> (B, T + 1) the sine's phase before each frame, and after the last, in turns from 0 to 1.

    Whole numbers of 2^-32 turns add up exactly, where float32 would be off by a cent of a turn after minutes.
    """
    steps = (f0.float() * (hop / rate) % 1 * 2**32).long().cumsum(1)
    return F.pad(steps % 2**32, (1, 0)).float() / 2**32


class HarmonicSource(nn.Module):
    """F0 -> a sine of that pitch with a little noise, noise alone where unvoiced; scaled by l_linear, through tanh."""

    def __init__(self, hop: int, rate: int):
        super().__init__()
        self.hop, self.rate = hop, rate
        self.l_linear = nn.Linear(1, 1)
        nn.init.constant_(self.l_linear.weight, SOURCE_GAIN)
        nn.init.zeros_(self.l_linear.bias)

    def forward(self, f0, excitation: Excitation | None = None):
        """f0 (B, T) Hz, 0 where unvoiced -> (B, 1, T * hop). In float32, for a phase in half precision is noise."""
        with torch.autocast(f0.device.type, enabled=False):
            start = source_turns(f0, self.hop, self.rate)[:, :-1, None]
            start = start if excitation is None else start + excitation.turns[:, None, None]
            samples = torch.arange(1, self.hop + 1, device=f0.device)
            turns = (start + f0.float()[..., None] / self.rate * samples).flatten(1)
            voiced = (f0 > 0).float().repeat_interleave(self.hop, dim=1)
            noise = torch.randn_like(turns) if excitation is None else excitation.source.squeeze(1)
            sine = SINE_LEVEL * torch.sin(2 * math.pi * (turns % 1)) * voiced
            wave = sine + noise * torch.where(voiced > 0, VOICED_NOISE, SINE_LEVEL / 3)
            return torch.tanh(self.l_linear(wave[..., None].to(self.l_linear.weight.dtype))).transpose(1, 2)


class Decoder(nn.Module):
    """HiFi-GAN's generator; with F0 the source joins in at each stage, brought down to the stage's rate by a convolution."""

    def __init__(self, config: VoiceConfig):
        super().__init__()
        rates, width = config.upsample_rates, config.upsample_initial
        self.conv_pre = nn.Conv1d(config.inter_channels, width, 7, padding=3)
        self.cond = nn.Conv1d(config.gin_channels, width, 1)
        self.m_source = HarmonicSource(config.hop, config.sample_rate) if config.f0 else None
        self.ups, self.noise_convs, self.resblocks = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        block = {"1": ResBlock1, "2": ResBlock2}[config.resblock]
        for i, (rate, kernel) in enumerate(zip(rates, config.upsample_kernels, strict=True)):
            width //= 2
            self.ups.append(weight_norm(nn.ConvTranspose1d(2 * width, width, kernel, rate, padding=(kernel - rate) // 2)))
            stride = math.prod(rates[i + 1 :])
            if config.f0:
                space = (2 * stride, stride, stride // 2) if stride > 1 else (1,)
                self.noise_convs.append(nn.Conv1d(1, width, *space))
            for size, dilations in zip(config.resblock_kernels, config.resblock_dilations, strict=True):
                self.resblocks.append(block(width, size, dilations))
        self.conv_post = nn.Conv1d(width, 1, 7, padding=3, bias=False)

    def forward(self, z, f0, g, excitation: Excitation | None = None):
        """z (B, inter, T), f0 (B, T) Hz, g (B, gin, 1) -> wave (B, 1, T * hop) in -1..1, float32."""
        source = None if self.m_source is None else self.m_source(f0, excitation)
        x = self.conv_pre(z) + self.cond(g)
        count = len(self.resblocks) // len(self.ups)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, LEAK))
            if source is not None:
                x = x + self.noise_convs[i](source)
            blocks = self.resblocks[i * count : (i + 1) * count]
            x = in_tiles(lambda x, blocks=blocks: sum(block(x) for block in blocks) / count, x, max(b.reach for b in blocks))
        return torch.tanh(self.conv_post(F.leaky_relu(x)).float())  # here the slope is torch's own, 0.01


class TextEncoder(nn.Module):
    """Content and coarse pitch -> mean and logarithm of the standard deviation of the latent without its speaker."""

    def __init__(self, config: VoiceConfig):
        super().__init__()
        hidden = config.hidden_channels
        self.emb_phone = nn.Linear(config.content_width, hidden)
        self.emb_pitch = nn.Embedding(PITCH_STEPS, hidden) if config.f0 else None
        sizes = (config.filter_channels, config.n_heads, config.n_layers, config.kernel_size)
        self.encoder = Transformer(hidden, *sizes, config.p_dropout)
        self.proj = nn.Conv1d(hidden, 2 * config.inter_channels, 1)

    def forward(self, phone, pitch, mask):
        """phone (B, T, C), pitch (B, T) from 0 to 255, or None without F0 -> m, logs (B, inter, T), float32."""
        x = self.emb_phone(phone)
        if self.emb_pitch is not None:
            x = x + self.emb_pitch(pitch)
        x = F.leaky_relu(x * math.sqrt(x.shape[-1]), LEAK).transpose(1, 2)
        return (self.proj(self.encoder(x, mask)) * mask).float().chunk(2, dim=1)


class PosteriorEncoder(nn.Module):
    """Linear spectrogram -> mean and logarithm of the standard deviation of the latent."""

    def __init__(self, config: VoiceConfig):
        super().__init__()
        self.pre = nn.Conv1d(config.bins, config.hidden_channels, 1)
        self.enc = WaveNet(config.hidden_channels, kernel=5, layers=16, gin=config.gin_channels)
        self.proj = nn.Conv1d(config.hidden_channels, 2 * config.inter_channels, 1)

    def forward(self, spec, mask, g):
        """spec (B, F, T), g (B, gin, 1) -> m, logs (B, inter, T), float32."""
        x = self.enc(self.pre(spec) * mask, mask, g)
        return (self.proj(x) * mask).float().chunk(2, dim=1)


class Flow(nn.Module):
    """Four couplings with a flip after each: takes the speaker g out of a latent, or (reverse) puts one in."""

    def __init__(self, config: VoiceConfig):
        super().__init__()
        sizes = (config.inter_channels, config.hidden_channels, config.gin_channels)
        self.flows = nn.ModuleList(layer for _ in range(4) for layer in (Coupling(*sizes), Flip()))

    def forward(self, z, mask, g, reverse: bool = False):
        for layer in reversed(self.flows) if reverse else self.flows:
            z = layer(z, mask, g, reverse=reverse)
        return z.float()


class Synthesizer(nn.Module):
    """The voice model. with_enc_q=False: as small checkpoints hold it, which convert and do not train.

    A frame of the wave depends on 24 frames of the latent to either side through the flow, and on 11 more through the decoder of
    40k v2 (9 in the demo's): chunks of a latent with so much around them are parts of the whole. enc_p hears all frames.
    """

    no_compile = "each batch of clips has a length of its own, and would be compiled anew"

    def __init__(self, config: VoiceConfig, with_enc_q: bool = True):
        super().__init__()
        self.config, self.facts = config, {}
        self.enc_p = TextEncoder(config)
        self.dec = Decoder(config)
        self.enc_q = PosteriorEncoder(config) if with_enc_q else None
        self.flow = Flow(config)
        self.emb_g = nn.Embedding(config.speakers, config.gin_channels)

    def save_pretrained(self, folder, half: bool = False) -> None:
        """config.json and model.safetensors, by the official names. half: in fp16, half the bytes."""
        from safetensors.torch import save_file

        state = {name: t.detach().cpu().contiguous() for name, t in to_old_names(self.state_dict()).items()}
        state = {name: t.half() for name, t in state.items()} if half else state
        write_json(Path(folder) / "config.json", self.config.to_json())
        save_file(state, Path(folder) / "model.safetensors", metadata={"format": "pt"})

    def speaker(self, sid):
        """(B,) rows -> g (B, gin, 1)."""
        return self.emb_g(sid).unsqueeze(-1)

    def forward(self, phone, lengths, pitch, f0, spec, sid, noise=None, source=None, start=None) -> TrainOutput:
        """A training step's outputs: phone (B, T, C), lengths and sid (B,), pitch and f0 (B, T) or None, spec (B, F, T).

        The decoder gets a random slice of segment_frames of each clip, the whole of a shorter one. enc_q, where frozen, is
        not differentiated: the speaker's row then learns by flow and dec, which is what a conversion uses it for.

        What is random: noise (B, inter, T) of the posterior's sample and source (B, 1, S * hop) of the decoder, standard normal;
        start (B,), where each slice is, from 0 to 1. None: drawn here.
        """
        mask, g = sequence_mask(lengths, phone.shape[1]), self.speaker(sid)
        m_p, logs_p = self.enc_p(phone, pitch, mask)
        with torch.set_grad_enabled(torch.is_grad_enabled() and any(p.requires_grad for p in self.enc_q.parameters())):
            z, m_q, logs_q = self.posterior(spec, mask, g, noise)
        z_p = self.flow(z, mask, g)
        frames = min(self.config.segment_frames, z.shape[-1])
        start = torch.rand(len(lengths), device=z.device) if start is None else start
        starts = (start * (lengths - frames + 1).clamp(min=1)).long()
        cut = starts[:, None] + torch.arange(frames, device=z.device)  # (B, S)
        if source is not None:
            source = Excitation(noise, source[..., : frames * self.config.hop], torch.zeros_like(start))
        wave = self.dec(take_frames(z, cut), None if f0 is None else f0.gather(1, cut), g, source)
        wave = wave * take_frames(mask, cut).repeat_interleave(self.config.hop, dim=-1)
        return TrainOutput(wave, starts, mask, z_p, m_p, logs_p, m_q, logs_q)

    def posterior(self, spec, mask, g, noise=None):
        """A sample of the latent of a spectrogram, and what it was drawn from: z, m, logs (B, inter, T)."""
        m, logs = self.enc_q(spec, mask, g)
        noise = torch.randn_like(m) if noise is None else noise
        return (m + noise * logs.exp()) * mask, m, logs

    def infer(self, phone, lengths, pitch, f0, sid, noise: float = NOISE, excitation: Excitation | None = None):
        """Conversion: content, pitch and speaker -> wave (B, 1, T * hop). noise: standard deviations' share of randomness."""
        mask, g = sequence_mask(lengths, phone.shape[1]), self.speaker(sid)
        m, logs = self.enc_p(phone, pitch, mask)
        latent = torch.randn_like(m) if excitation is None else excitation.latent
        z = self.flow((m + logs.exp() * latent * noise) * mask, mask, g, reverse=True)
        return self.dec(z * mask, f0, g, excitation)

    def resynthesize(self, spec, lengths, f0, sid):
        """A recording through the posterior and back: the best that the decoder can do. spec (B, F, T) -> (B, 1, T * hop)."""
        mask, g = sequence_mask(lengths, spec.shape[-1]), self.speaker(sid)
        return self.dec(self.posterior(spec, mask, g)[0], f0, g)


def take_frames(x, frames):
    """x (B, C, T) at the frames (B, S) -> (B, C, S)."""
    return x.gather(2, frames.unsqueeze(1).expand(-1, x.shape[1], -1))
