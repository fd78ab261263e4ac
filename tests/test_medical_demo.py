"""The demo: the same patients for the same seed, in TotalSegmentator's layout, and a base that knows primitives."""

import hashlib
import sys

import nibabel
import numpy as np
import pytest
from conftest import MEDICAL, ROOT, use_task
from scipy import ndimage

TASK = MEDICAL
use_task(MEDICAL)
sys.path.append(str(ROOT / "scripts"))
from base_medical import dice, mean_dice, thick_view  # noqa: E402
from decoder import SLatMeshDecoder  # noqa: E402
from latents import LatentEncoder  # noqa: E402
from model import DEMO_BASE, OrganMesher, load_base  # noqa: E402
from synthetic import ORGANS, draw_masks, make_demo_data, organ_shape, primitive_shape  # noqa: E402


def hashes(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.nii.gz"))
    }


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return make_demo_data(tmp_path_factory.mktemp("medical") / "demo", train=3, val=2, test=1)


def test_files_depend_on_the_seed_and_their_own_place_alone(demo, tmp_path):
    again, other = (make_demo_data(tmp_path / str(seed), seed, train=2, val=0, test=0) for seed in (0, 1))
    assert hashes(again).items() < hashes(demo).items(), "asking for more leaves the first ones as they were"
    assert not set(hashes(again).values()) & set(hashes(other).values())
    with pytest.raises(FileExistsError):
        make_demo_data(demo)


def test_patients_hold_up_to_two_organs_and_one_split_each(demo):
    rows = [line.split(";") for line in (demo / "target" / "meta.csv").read_text().splitlines()[1:]]
    assert [row[0] for row in rows] == ["s0001", "s0002", "s0003", "s0004"]
    assert [row[-1] for row in rows] == ["train", "train", "val", "test"]
    masks = {row[0]: sorted(p.name for p in (demo / "target" / row[0] / "segmentations").iterdir()) for row in rows}
    assert [len(names) for names in masks.values()] == [2, 1, 2, 1]
    assert {name for names in masks.values() for name in names} <= {f"{organ}.nii.gz" for organ in ORGANS}


def test_an_organ_is_whole_off_the_border_and_where_the_ct_shows_it(demo):
    for path in (demo / "target").glob("*/segmentations/*.nii.gz"):
        image, scan = nibabel.load(path), nibabel.load(path.parents[1] / "ct.nii.gz")
        assert np.array_equal(image.affine, scan.affine) and np.allclose(image.get_qform(), image.affine, atol=1e-4)
        mask, values = np.asarray(image.dataobj) > 0, np.asarray(scan.dataobj)
        assert ndimage.label(mask)[1] == 1 and mask.sum() > 2000
        assert mask[3:-3, 3:-3, 3:-3].sum() == mask.sum(), "no voxel near the border"
        shell = ndimage.binary_dilation(mask, iterations=3) & ~ndimage.binary_dilation(mask)
        assert values[ndimage.binary_erosion(mask)].mean() > values[shell].mean() + 60


def test_organs_stay_what_they_are_in_any_patient():
    """A vertebra has one hole, the canal; the others have none. Euler characteristic of a solid: 1 less its holes."""
    from skimage.measure import euler_number

    for number, name in enumerate([*ORGANS, *ORGANS]):
        rng = np.random.default_rng(number)
        (mask,), _, _ = draw_masks([organ_shape(name, rng)], rng)
        assert euler_number(mask, connectivity=3) == (0 if name.startswith("vertebrae") else 1), name


def test_a_primitive_has_its_distance_right_at_the_surface():
    """|gradient| is 1 there, but where two parts are blended: what is sampled as a distance in mm is one."""
    for seed in range(6):
        shape, step = primitive_shape(np.random.default_rng(seed)), 1e-3
        points = np.random.default_rng(seed).uniform(-60, 60, (40000, 3))
        points = points[np.abs(shape(points)) < 1]
        gradient = [(shape(points + step * axis) - shape(points - step * axis)) / (2 * step) for axis in np.eye(3)]
        assert len(points) > 100 and abs(np.median(np.linalg.norm(gradient, axis=0)) - 1) < 0.05


# ---- the base --------------------------------------------------------------------------------------------------------------


def test_the_base_knows_primitives_and_has_something_to_learn_of_organs():
    """On primitives that it has never seen its meshes are nearer to the truth than interpolation, and those of new weights."""
    base, processor, facts = load_base("demo")
    assert sum(path.stat().st_size for path in DEMO_BASE.iterdir()) < 2_000_000 and facts["name"] == "demo"
    twin = OrganMesher(LatentEncoder(len(processor.channels)), SLatMeshDecoder(base.decoder.config)).eval()
    primitives = [thick_view(9, number) for number in range(8)]
    known, new = (mean_dice(model, processor, primitives) for model in (base, twin))
    filled = np.mean([dice(observed.filled, organ.mask) for organ, observed in primitives])
    assert known > filled + 0.01 and known > new + 0.1
