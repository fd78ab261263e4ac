"""Trains the small base of the CLIP demo from scratch; called by make_demo_base.py.

A CLIP of half a million weights: 64 x 64 pictures of textured shapes on one side, captions such as "a photo of a large red
striped disc" on the other, and a loss that draws a picture to the captions that are true of it. Captions leave words out, so
several are true of one picture, and the shape is sometimes called by a made-up word: the text tower learns to read past words
that it does not know. Every patch is also asked what it shows, as for the classifier's base; that layer is thrown away.
"""

import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from base_classification import augment_look, patch_loss
from base_training import reload, start, train, write_card
from common.config import Count, Range, Rate, Seed

CLIP = Path(__file__).resolve().parents[1] / "fine_tuning"
PATCH = 8  # pixels, the side of the vision tower's patches
VOCABULARY = 640  # tokens: 512 for single bytes inside and at the end of words, the rest for the captions' words


@dataclass
class ClipConfig:
    output_dir: str = str(CLIP / "demo_base")  # folder to write
    seed: Seed = 0  # of weights, pictures, captions and augmentation
    steps: Count = 3600  # optimizer steps
    batch_size: Annotated[int, Range(2, 4096)] = 40  # pairs of picture and caption a step
    lr: Rate = 1.5e-3  # constant for four tenths of the steps, then down by a cosine
    pictures: Count = 40  # pictures drawn of each combination of words, fewer where fewer are seen


def make_clip(config):
    """Trains the base, writes it to config.output_dir, reads it back and measures it on combinations that it was never shown."""
    from transformers import AutoModel, AutoTokenizer

    start(config)
    sys.path.insert(0, str(CLIP))
    from synthetic import COMBINATIONS, UNSEEN, caption

    started = time.process_time()
    tokenizer = train_tokenizer(config.seed)
    model = clip_from_scratch(tokenizer).train()
    seen = [c for c in COMBINATIONS if c not in UNSEEN]
    each = min(config.pictures, -(-config.steps * config.batch_size // len(seen)))
    pictures, masks, words = draw_combinations(seen, each, config.seed)
    train_clip(model, tokenizer, config, pictures, masks, words)

    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    clip_processor().save_pretrained(folder)
    seconds = time.process_time() - started
    fresh = draw_combinations(UNSEEN, min(8, each), config.seed + 1)
    reloaded = reload(AutoModel, folder), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    both = (model, tokenizer), reloaded
    trained, loaded = (zero_shot_accuracy(*pair, fresh[0], fresh[2], COMBINATIONS, caption) for pair in both)
    assert trained == loaded, f"accuracy {trained} trained, {loaded} reloaded"
    facts = {"vocabulary": len(tokenizer), "count": len(pictures), "seen": len(seen), "unseen": len(UNSEEN)}
    facts |= {"held_out": len(fresh[0]), "combinations": len(COMBINATIONS), "accuracy": loaded}
    write_card(folder, CLIP_CARD, model, config, seconds, **facts)
    where = f"{len(fresh[0])} pictures of unseen combinations"
    print(f"{folder}: zero-shot accuracy {loaded:.3f} on {where}, {seconds:.0f} CPU seconds")


def train_clip(model, tokenizer, config, pictures, masks, words):
    """Trains on pictures uint8 (N, 3, 64, 64), masks (N, 64, 64) and the numbers (N,) of their combinations of words."""
    import torch

    from synthetic import ATTRIBUTES, COMBINATIONS

    generator, chance = torch.Generator().manual_seed(config.seed), random.Random(config.seed)
    # COMBINATIONS counts sizes, colours, textures, shapes like the digits of a number: the rest is texture and shape.
    kinds = len(ATTRIBUTES["texture"]) * len(ATTRIBUTES["shape"])
    patch_head = torch.nn.Linear(model.config.vision_config.hidden_size, PATCH**2 + kinds)
    optimizer = torch.optim.AdamW([*model.parameters(), *patch_head.parameters()], lr=config.lr, weight_decay=0.05, fused=True)

    def loss_of(_, rows):
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.6052)  # 100, as CLIP
        pixels, masks_b = augment_look(pictures[rows], masks[rows], generator, mix_colours=False)
        said = [mention(chance, COMBINATIONS[i]) for i in words[rows].tolist()]
        texts = tokenizer([text for text, _ in said], padding=True, return_tensors="pt")
        states = model.vision_model(pixel_values=pixels)
        images, captions = model.visual_projection(states.pooler_output), model.get_text_features(**texts).pooler_output
        loss = contrastive_loss(images, captions, model.logit_scale, truth(words[rows], said))
        return loss + patch_loss(patch_head(states.last_hidden_state[:, 1:]), masks_b, words[rows] % kinds, PATCH)

    train(model, optimizer, config, len(pictures), generator, loss_of)


CLIP_CARD = """\
# Small CLIP, the base of the CLIP demo

A `CLIPModel` with {weights:,} weights: a ViT of four layers of width 96 for 64 x 64 pictures, a text tower of two layers of width
48, a tokenizer of {vocabulary} tokens. It knows synthetic pictures of textured shapes (domain "source" of
`fine_tuning/synthetic.py`) and captions such as "a photo of a large red striped disc", and nothing else. It is there to learn
and to test with.

Made from scratch by `python scripts/make_demo_base.py clip`: {steps} steps in batches of {batch} from {count} pictures of {seen}
combinations of words, seed {seed}; {minutes:.0f} minutes on one CPU thread.

The other {unseen} combinations it was never shown. On {held_out} fresh pictures of these it picks the right caption out of all
{combinations} with accuracy {accuracy:.3f}.
"""


def train_tokenizer(seed):
    """A CLIP tokenizer that has the captions' words as tokens, and can spell every other word."""
    from transformers import CLIPTokenizer

    from synthetic import COMBINATIONS

    chance = random.Random(seed)
    captions = [mention(chance, c)[0] for c in COMBINATIONS for _ in range(20)]
    spelt = [" ".join(chr(97 + (i + k) % 26) for k in range(26)) for i in range(26)]
    tokenizer = CLIPTokenizer().train_new_from_iterator([*captions, *spelt], vocab_size=VOCABULARY)
    tokenizer.model_max_length = 77  # what the text tower has positions for
    return tokenizer


def clip_from_scratch(tokenizer):
    """A small CLIPModel with random weights for this tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": 77,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": 64,
    }
    vision = {
        "image_size": 64,
        "patch_size": PATCH,
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "intermediate_size": 288,
        "projection_dim": 64,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def clip_processor():
    """What turns a picture into `pixel_values`: 64 x 64, values from -1 to 1."""
    from transformers import CLIPImageProcessor

    size = {"height": 64, "width": 64}
    return CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def draw_combinations(combinations, each, seed):
    """Draws `each` pictures of every combination of words.

    Returns pictures uint8 (N, 3, 64, 64), masks float (N, 64, 64) with 1 where the shape is, and the index of each picture's
    combination among all, int64 (N,). A picture depends on (seed, its combination, its number) alone.
    """
    import numpy as np
    import torch
    from tqdm import tqdm

    from synthetic import COMBINATIONS, SCENE_SIZE, draw_source

    count = each * len(combinations)
    pictures = torch.empty(count, 3, SCENE_SIZE, SCENE_SIZE, dtype=torch.uint8)
    masks = torch.empty(count, SCENE_SIZE, SCENE_SIZE)
    words = torch.empty(count, dtype=torch.long)
    for row in tqdm(range(count), desc="drawing", mininterval=5):
        combination = combinations[row % len(combinations)]
        words[row] = COMBINATIONS.index(combination)
        picture, mask = draw_source(np.random.default_rng((seed, 0, int(words[row]), row // len(combinations))), combination)
        pictures[row], masks[row] = torch.from_numpy(picture).permute(2, 0, 1), torch.from_numpy(mask)
    return pictures, masks, words


def mention(chance, combination):
    """(caption, the words that it uses or "" for each attribute): each word stays out one time in four.

    In place of the shape's name there is sometimes a made-up word, of which nothing can be learnt.
    """
    from synthetic import caption

    used = tuple(word if chance.random() < 0.75 else "" for word in combination)
    text = caption(used)
    if not used[3] and chance.random() < 0.6:
        name = "".join(chance.choice("bcdfghjklmnprstvwz" if k % 3 != 1 else "aeiou") for k in range(chance.randint(4, 7)))
        text = text.replace("thing", name)
    return text, used


def truth(words, said):
    """(B, B) float: whether caption j is true of picture i. words (B,) indices of combinations; said: what `mention` gave."""
    import torch

    from synthetic import COMBINATIONS

    true = [[all(u in ("", w) for u, w in zip(used, COMBINATIONS[i], strict=True)) for _, used in said] for i in words.tolist()]
    return torch.tensor(true).float()


def contrastive_loss(images, texts, logit_scale, true):
    """CLIP's loss where several captions may be true of a picture: cross-entropy against equal shares of all true ones.

    images, texts (B, D); true (B, B) with ones on the diagonal.
    """
    from torch.nn.functional import cross_entropy, normalize

    logits = logit_scale.exp() * normalize(images, dim=1) @ normalize(texts, dim=1).T
    rows, columns = true / true.sum(dim=1, keepdim=True), true.T / true.T.sum(dim=1, keepdim=True)
    return (cross_entropy(logits, rows) + cross_entropy(logits.T, columns)) / 2


def zero_shot_accuracy(model, tokenizer, pictures, words, combinations, caption):
    """The share of pictures uint8 (N, 3, H, W) whose nearest caption is that of their combination (indices (N,))."""
    import torch

    processor = clip_processor()
    with torch.no_grad():
        texts = tokenizer([caption(c) for c in combinations], padding=True, return_tensors="pt")
        texts = torch.nn.functional.normalize(model.get_text_features(**texts).pooler_output, dim=1)
        batches = [processor(list(batch), return_tensors="pt")["pixel_values"] for batch in pictures.split(50)]
        images = torch.cat([model.get_image_features(batch).pooler_output for batch in batches])
    return ((images @ texts.T).argmax(dim=1) == words).float().mean().item()
