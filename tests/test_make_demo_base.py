"""The script that made the small bases makes, in a few steps, bases of the very kind that are committed."""

import json

import pytest
from conftest import CLASSIFICATION, CLIP, DETECTION, MEDICAL, POSE, ROOT, VOICE, Script, run_script


def differing(one: dict, other: dict) -> list[str]:
    """Keys whose values differ. Another version of transformers may write more or fewer of them; what both write counts."""
    names = []
    for key in one.keys() & other.keys():
        if isinstance(one[key], dict) and isinstance(other[key], dict):
            names += [f"{key}.{name}" for name in differing(one[key], other[key])]
        elif one[key] != other[key]:
            names.append(key)
    return names


@pytest.mark.parametrize(
    "name, task, measured",
    [
        ("classification", CLASSIFICATION, "accuracy"),
        ("clip", CLIP, "zero-shot accuracy"),
        ("detection", DETECTION, "mAP50"),
        ("medical", MEDICAL, "fresh primitives"),
        ("pose", POSE, "pixels error"),
        ("voice", VOICE, "dB distortion"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
@pytest.mark.slow
def test_a_base_has_the_committed_architecture_and_loads(tmp_path, name, task, measured):
    args = [name, "--steps", 2, "--output_dir", tmp_path / "base"]
    done = Script(ROOT / "scripts", "make_demo_base.py", args, tmp_path / "log").wait()
    assert measured in done.stdout
    made, committed = tmp_path / "base", task / "demo_base"
    configs = [json.loads((folder / "config.json").read_text()) for folder in (made, committed)]
    assert set(differing(*configs)) <= {"transformers_version"}
    assert len(str(configs[0])) > 200, "there was something to compare"
    assert {p.name for p in made.iterdir()} == {p.name for p in committed.iterdir()}
    for file in committed.glob("*.safetensors"):
        assert file.stat().st_size == (made / file.name).stat().st_size < 2_000_000


def test_an_unknown_task_is_named(tmp_path):
    done = run_script(ROOT / "scripts", "make_demo_base.py", "weather", expect=2)
    assert done.stderr.startswith("error: ") and "detection" in done.stderr
