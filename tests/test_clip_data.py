"""CLIP's data: demo pictures and words are as documented, classes.txt is checked, the small base knows what it should."""

import hashlib
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
from conftest import CLIP, ROOT, use_task
from test_labelled import CLASSES, fill, processor, settings

TASK = CLIP
use_task(TASK)
sys.path.insert(0, str(ROOT / "scripts"))

import base_clip  # noqa: E402
from common.config import UserError  # noqa: E402
from data import build_loaders, check_class_list, load_for_eval, read_tables  # noqa: E402
from synthetic import (  # noqa: E402
    ATTRIBUTES,
    BREEDS,
    COMBINATIONS,
    KINDS,
    SHAPES,
    TEXTURES,
    UNSEEN,
    caption,
    make_demo_data,
)


def digests(folder):
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.png")}


# ---- demo pictures ---------------------------------------------------------------------------------------------------


def test_demo_pictures_are_a_function_of_seed_and_name(tmp_path):
    counts = {"train": 1, "val": 1, "test": 1}
    first = digests(make_demo_data(tmp_path / "first", **counts))
    assert set(first) == {f"{split}/{name}/000.png" for split in counts for name in BREEDS}
    assert len(set(first.values())) == len(first)  # no two are the same
    more = digests(make_demo_data(tmp_path / "more", **{**counts, "train": 2}))
    assert {name: more[name] for name in first} == first and len(more) == len(first) + 8
    other = digests(make_demo_data(tmp_path / "other", seed=1, **counts))
    assert set(other) == set(first) and not set(other.values()) & set(first.values())
    with pytest.raises(FileExistsError, match="is not empty"):
        make_demo_data(tmp_path / "first")
    assert digests(tmp_path / "first") == first and not list(tmp_path.glob("*.tmp"))


def test_every_texture_and_every_kind_comes_in_two_breeds():
    textures, kinds = zip(*(name.split("_") for name in BREEDS), strict=True)
    assert Counter(textures) == dict.fromkeys(TEXTURES, 2) and Counter(kinds) == dict.fromkeys(KINDS, 2)
    assert len(set(BREEDS)) == 8


def test_the_base_has_never_seen_a_breeds_shape_nor_read_its_name():
    assert len(set(KINDS.values())) == 4 and not set(KINDS.values()) & set(SHAPES)
    known = {word for words in ATTRIBUTES.values() for word in words}
    assert not set(KINDS) & known and set(TEXTURES) <= known


# ---- what the small base was trained on ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base():
    from transformers import AutoModel, AutoTokenizer

    return AutoModel.from_pretrained(CLIP / "demo_base").eval(), AutoTokenizer.from_pretrained(CLIP / "demo_base")


def test_unseen_combinations_are_not_drawn_for_training(base, monkeypatch):
    class Drawn(Exception):
        pass

    def draw(combinations, each, seed):
        raise Drawn(combinations)

    monkeypatch.setattr(base_clip, "draw_combinations", draw)
    monkeypatch.setattr(base_clip, "train_tokenizer", lambda _: base[1])
    monkeypatch.setattr(sys, "path", sys.path[:])
    with pytest.raises(Drawn) as drawn:
        base_clip.make_clip(base_clip.ClipConfig(steps=1))
    seen = drawn.value.args[0]
    assert len(seen) == 231 and len(UNSEEN) == 57 and set(seen) | set(UNSEEN) == set(COMBINATIONS)
    assert not set(seen) & set(UNSEEN) and len(set(COMBINATIONS)) == 288
    for part in (seen, UNSEEN):
        for words, there in zip(ATTRIBUTES.values(), zip(*part, strict=True), strict=True):
            assert set(there) == set(words)


def test_captions_leave_out_what_is_not_said():
    assert caption(("large", "red", "striped", "disc")) == "a photo of a large red striped disc"
    assert caption(("", "red", "", "")) == "a photo of a red thing"
    assert len({caption(c) for c in COMBINATIONS}) == 288


def test_the_committed_base_tells_unseen_combinations_apart(base):
    """One picture of each, the caption out of all 288; guessing finds one in 288."""
    pictures, _, words = base_clip.draw_combinations(UNSEEN, 1, seed=1)
    assert len(pictures) == 57 and [COMBINATIONS[i] for i in words.tolist()] == list(UNSEEN)
    assert base_clip.zero_shot_accuracy(*base, pictures, words, COMBINATIONS, caption) > 0.85


# ---- a user's folder -------------------------------------------------------------------------------------------------


def test_a_class_list_that_fits_is_fine_in_any_order(tmp_path):
    fill(tmp_path, 4)
    check_class_list(tmp_path, CLASSES)  # there need not be one
    (tmp_path / "classes.txt").write_text("\n".join(["", *CLASSES[::-1], " ", ""]))
    assert build_loaders(settings(tmp_path), processor(), read_tables(str(tmp_path), 0))[2] == CLASSES


@pytest.mark.parametrize(
    "content, told",
    [
        ("bird\ncat\ndog\nunicorn", "no pictures of unicorn"),
        ("bird\ncat", "dog not in the list"),
        ("bird\ncat\ndoggy", "no pictures of doggy; dog not in the list"),
        ("bird\ncat\ndog\ncat", "a name twice"),
        ("", "bird, cat, dog not in the list"),
        (b"bird\nc\xe4t\ndog", "cannot be read"),
    ],
)
def test_a_class_list_that_does_not_fit_is_named(tmp_path, content, told):
    fill(tmp_path, 4)
    (tmp_path / "classes.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        build_loaders(settings(tmp_path), processor(), read_tables(str(tmp_path), 0))
    text = str(caught.value)
    assert str(tmp_path / "classes.txt") in text and told in text and "\n" not in text


def test_eval_holds_out_the_pictures_that_training_held_out(tmp_path):
    fill(tmp_path, 12)
    _, val, *_ = build_loaders(settings(tmp_path), processor(), read_tables(str(tmp_path), 0))
    config = SimpleNamespace(data_dir="", split="val", subset=False, batch_size=0, num_workers=0)
    about = {"classes": CLASSES, "seed": 0, "batch_size": 2, "data_dir": str(tmp_path)}
    loader, *_ = load_for_eval(config, processor(), about)
    assert [s.name for s in loader.dataset.samples] == [s.name for s in val.dataset.samples]
