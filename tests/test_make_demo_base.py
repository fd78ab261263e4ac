"""The script that made the small bases makes, in a few steps, a base of the very kind that is committed."""

import json

from conftest import DETECTION, ROOT, run_script


def differing(one: dict, other: dict) -> list[str]:
    """Keys whose values differ. Another version of transformers may write more or fewer of them; what both write counts."""
    names = []
    for key in one.keys() & other.keys():
        if isinstance(one[key], dict) and isinstance(other[key], dict):
            names += [f"{key}.{name}" for name in differing(one[key], other[key])]
        elif one[key] != other[key]:
            names.append(key)
    return names


def test_detection_base_has_the_committed_architecture_and_loads(tmp_path):
    done = run_script(ROOT / "scripts", "make_demo_base.py", "detection", "--steps", 2, "--output_dir", tmp_path / "base")
    assert "mAP50" in done.stdout
    folders = (tmp_path / "base", DETECTION / "demo_base")
    made, committed = (json.loads((folder / "config.json").read_text()) for folder in folders)
    assert set(differing(made, committed)) <= {"transformers_version"}
    assert len(made.keys() & committed.keys()) > 30
    sizes = [(folder / "model.safetensors").stat().st_size for folder in folders]
    assert sizes[0] == sizes[1] < 2_000_000


def test_an_unknown_task_is_named(tmp_path):
    done = run_script(ROOT / "scripts", "make_demo_base.py", "weather", expect=2)
    assert done.stderr.startswith("error: ") and "detection" in done.stderr
