"""Synthetic patients: organ-like shapes in a plausible CT, written as TotalSegmentator's folders are; and primitives.

A shape is a function of points (..., 3) in mm to a distance in mm, negative inside: exact on the surface and near enough around
it. Organs are blends, cuts and bends of simple solids (signed distance functions; Ricci 1973 for blending), each patient's of
another size, turn, bend and waviness. The small base has never seen them: it was trained on primitive_shape() alone.

    from synthetic import make_demo_data
    make_demo_data("data/demo")      # target/meta.csv, target/s0001/ct.nii.gz, target/s0001/segmentations/liver.nii.gz ...
"""

import numpy as np

from common.folders import empty_folder

SPLITS = ("train", "val", "test")
ORGANS = {
    # TotalSegmentator's name: (half of its length in mm, HU)
    "liver": (62, 60),
    "kidney_left": (52, 35),
    "spleen": (50, 50),
    "urinary_bladder": (44, 10),
    "vertebrae_L3": (46, 200),
}
FAT = -90  # HU around the organs
CORTICAL = 550  # HU in the outer 3 mm of a bone
GAP = 5  # voxels between an organ and the border, or another organ


def make_demo_data(folder, seed=0, train=20, val=6, test=10):
    """Writes `folder`/target in TotalSegmentator's layout; returns `folder`.

    train, val, test: numbers of organs, two of them in a patient. A patient depends on (seed, split, number in the split) alone.
    FileExistsError where `folder` exists and is not empty.
    """
    folder = empty_folder(folder)
    target, rows = folder / "target", ["image_id;study_type;split"]
    for split, count in zip(SPLITS, (train, val, test), strict=True):
        for first in range(0, count, 2):
            name, rng = f"s{len(rows):04d}", np.random.default_rng((seed, SPLITS.index(split), first))
            organs = [list(ORGANS)[i % len(ORGANS)] for i in range(first, min(first + 2, count))]
            write_patient(target / name, organs, rng)
            rows.append(f"{name};ct synthetic;{split}")
    (target / "meta.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def write_patient(folder, organs, rng):
    """ct.nii.gz and segmentations/<organ>.nii.gz of one patient, who has the organs of these names."""
    masks, distances, affine = draw_masks([organ_shape(name, rng) for name in organs], rng)
    write_volume(folder / "ct.nii.gz", draw_ct(organs, distances, rng), affine)
    for name, mask in zip(organs, masks, strict=True):
        write_volume(folder / "segmentations" / f"{name}.nii.gz", mask.astype(np.uint8), affine)


def write_volume(path, array, affine):
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    nibabel.save(image, path)


# ---- a volume ------------------------------------------------------------------------------------------------------------------


def draw_masks(shapes, rng):
    """Shapes side by side on one voxel grid: (masks, distances), lists of (X, Y, Z) bool and mm, and affine (4, 4) -> RAS mm.

    Voxels of 1.6 to 2.2 mm; slices as thick, or up to a quarter thicker; stored as RAS, LAS or LPS; every third grid is tilted.
    """
    spacing = rng.uniform(1.6, 2.2) * np.array([1, 1, rng.choice([1, 1.25])])
    boxes = [extent(shape) for shape in shapes]
    sizes = np.array([high - low for low, high in boxes]) + GAP * spacing
    room = np.array([sizes[:, 0].sum(), *sizes[:, 1:].max(0)]) + GAP * spacing
    points = np.stack(np.meshgrid(*(np.arange(0, *pair) for pair in zip(room, spacing, strict=True)), indexing="ij"), -1)
    distances, left = [], GAP * spacing[0]
    for shape, (low, high), size in zip(shapes, boxes, sizes, strict=True):
        centre = np.array([left + (high - low)[0] / 2, *room[1:] / 2])
        distances.append(shape(points - centre + (low + high) / 2).astype(np.float32))
        left += size[0]
    tilt = rotation_about(rng.integers(0, 2), rng.uniform(-12, 12) * (rng.uniform() < 1 / 3))
    affine = np.eye(4)
    affine[:3, :3] = tilt * spacing
    affine[:3, 3] = rng.uniform(-100, 0, 3)
    flipped = [[], [0], [0, 1]][rng.integers(3)]
    distances = [np.ascontiguousarray(np.flip(each, flipped)) for each in distances]
    for axis in flipped:
        affine[:3, 3] += affine[:3, axis] * (points.shape[axis] - 1)
        affine[:3, axis] *= -1
    return [each < 0 for each in distances], distances, affine


def extent(shape, reach=100.0):
    """(lowest, highest corner) of the box around a shape, in mm and a little more; it lies within `reach` mm of 0."""
    grid = np.linspace(-reach, reach, 33)
    inside = np.argwhere(shape(np.stack(np.meshgrid(grid, grid, grid, indexing="ij"), -1)) < 0)
    step = grid[1] - grid[0]
    return grid[inside.min(0)] - step, grid[inside.max(0)] + step


def draw_ct(organs, distances, rng):
    """int16 (X, Y, Z) HU: organs in fat, their borders shared between voxels, and a scanner's noise."""
    from scipy.ndimage import gaussian_filter

    shape = distances[0].shape
    slow = gaussian_filter(rng.standard_normal(shape), 6)
    values = FAT + 15 * slow / slow.std()
    for name, distance in zip(organs, distances, strict=True):
        density = ORGANS[name][1] + rng.uniform(-10, 10)
        if name.startswith("vertebrae"):
            density = np.where(distance > -3, CORTICAL, density)
        values += np.clip(0.5 - distance / 2, 0, 1) * (density - values)
    noise = gaussian_filter(rng.standard_normal(shape), 0.6)
    return np.round(values + rng.uniform(8, 16) * noise / noise.std()).astype(np.int16)


# ---- shapes --------------------------------------------------------------------------------------------------------------------


def organ_shape(name, rng):
    """An organ of this name of ORGANS, of a patient of his own."""
    solid = {
        "liver": liver,
        "kidney_left": kidney,
        "spleen": spleen,
        "urinary_bladder": bladder,
        "vertebrae_L3": vertebra,
    }[name](rng)
    turn = np.linalg.multi_dot([rotation_about(axis, rng.normal(0, 8)) for axis in range(3)])
    return deformed(solid, ORGANS[name][0] * rng.uniform(0.8, 1.15), turn, rng.normal(0, 0.08, 2), waves(rng, 0.02))


def primitive_shape(rng):
    """One solid or two blended, of any size and turn: rounded boxes, tori, capsules, ellipsoids; smooth, straight, no organ."""
    parts = [primitive(rng) for _ in range(rng.integers(1, 3))]
    offset = rng.uniform(-0.5, 0.5, 3) * (len(parts) > 1)
    parts = [turned(part, random_rotation(rng), sign * offset) for part, sign in zip(parts, (1, -1), strict=False)]
    return deformed(blend(0.1, *parts), rng.uniform(32, 60), random_rotation(rng), (0, 0), [])


def primitive(rng):
    """A solid within about a unit of 0, as a function of points (..., 3) in units."""
    kind = rng.integers(4)
    if kind == 0:
        return box(rng.uniform(0.25, 0.75, 3), rng.uniform(0.03, 0.2))
    if kind == 1:
        return torus(rng.uniform(0.5, 0.7), rng.uniform(0.18, 0.3))
    if kind == 2:
        half = np.array([0, 0, rng.uniform(0.3, 0.65)])
        return capsule(-half, half, rng.uniform(0.2, 0.4))
    return ellipsoid((0, 0, 0), rng.uniform(0.35, 0.95, 3))


def liver(rng):
    """A large right lobe and a flat left one, cut from below and behind."""
    right = ellipsoid((0.32, 0, 0), rng.uniform(0.9, 1.1, 3) * (0.66, 0.55, 0.66))
    left = ellipsoid((-0.42, 0.15, 0.2), rng.uniform(0.85, 1.15, 3) * (0.58, 0.34, 0.28))
    normal = np.array([-0.35, -0.45, -0.8]) + rng.normal(0, 0.08, 3)
    return cut(blend(0.25, right, left), half_space(normal, rng.uniform(0.2, 0.3)), 0.08)


def kidney(rng):
    """A bean: bent inwards at both ends, with a hilum that faces the spine (+x is to the right, the kidney is the left one)."""
    hilum = ellipsoid((0.5, 0.1, 0), (rng.uniform(0.28, 0.42), 0.18, rng.uniform(0.2, 0.32)))
    bean = ellipsoid((0, 0, 0), rng.uniform(0.9, 1.1, 3) * (0.46, 0.36, 0.92))
    curve = rng.uniform(0.15, 0.3)
    return lambda p: cut(bean, hilum, 0.08)(p - curve * p[..., 2:] ** 2 * np.array([1, 0, 0]))


def spleen(rng):
    """A curved slab: an ellipsoid less the ball that it leans against."""
    ball = ellipsoid(rng.normal(0, 0.08, 3) + (0.95, 0.1, 0), (0.82, 0.8, 0.95))
    body = ellipsoid((0, 0, 0), rng.uniform(0.9, 1.1, 3) * (0.56, 0.62, 0.95))
    return cut(body, ball, 0.06)


def bladder(rng):
    """A flattened ball that runs down into a neck."""
    body = ellipsoid((0, 0, 0.1), rng.uniform(0.8, 1.1, 3) * (0.85, 0.7, 0.6))
    return blend(0.3, body, capsule((0, 0.1, -0.3), (0, 0.05, -0.8), rng.uniform(0.12, 0.2)))


def vertebra(rng):
    """A body, a ring around the canal behind it, a spinous process and two transverse ones."""
    wide, thin = rng.uniform(0.42, 0.5), rng.uniform(0.1, 0.14)
    ring = turned(torus(rng.uniform(0.27, 0.32), thin), np.eye(3), (0, -0.12, 0.05))
    spine = capsule((0, -0.45, 0), (0, -0.95, rng.uniform(-0.25, -0.05)), thin)
    sides = [capsule((side * 0.3, -0.2, 0.05), (side * rng.uniform(0.7, 0.85), -0.32, 0.1), 0.1) for side in (-1, 1)]
    body = turned(cylinder(wide, rng.uniform(0.26, 0.32), 0.06), np.diag([1, 1.3, 1]), (0, 0.4, 0))
    return blend(0.08, body, ring, spine, *sides)


def deformed(solid, size, turn, bend, ripples):
    """A solid in units as a shape in mm: `size` mm a unit, turned by `turn` (3, 3), bent along its z, its surface wavy."""

    def distance(points):
        p = points @ turn / size
        p = p - p[..., 2:] ** 2 * np.array([*bend, 0])
        return size * (solid(p) + sum(height * np.sin(p @ wave + phase) for height, wave, phase in ripples))

    return distance


def waves(rng, height):
    """Four low waves over a surface: [(height in units, wave vector (3,), phase)]; two to four to a length of the organ."""
    return [(rng.uniform(0.3, 1) * height, rng.normal(0, 3.5, 3), rng.uniform(0, 6.3)) for _ in range(4)]


# ---- solids: functions of points (..., 3) to a distance, in units --------------------------------------------------------------


def box(half, rounding):
    def distance(p):
        q = np.abs(p) - (half - rounding)
        return np.linalg.norm(np.maximum(q, 0), axis=-1) + np.minimum(q.max(-1), 0) - rounding

    return distance


def torus(ring, tube):
    return lambda p: np.hypot(np.hypot(p[..., 0], p[..., 1]) - ring, p[..., 2]) - tube


def cylinder(radius, half, rounding):
    def distance(p):
        q = np.stack([np.hypot(p[..., 0], p[..., 1]) - radius, np.abs(p[..., 2]) - half], -1) + rounding
        return np.linalg.norm(np.maximum(q, 0), axis=-1) + np.minimum(q.max(-1), 0) - rounding

    return distance


def capsule(one, other, radius):
    one, axis = np.array(one), np.subtract(other, one)

    def distance(p):
        along = np.clip((p - one) @ axis / (axis @ axis), 0, 1)
        return np.linalg.norm(p - one - along[..., None] * axis, axis=-1) - radius

    return distance


def ellipsoid(centre, radii):
    """To first order: f / |grad f|, exact on the surface."""
    centre, radii = np.array(centre), np.array(radii)

    def distance(p):
        q = (p - centre) / radii
        scale = np.linalg.norm(q, axis=-1)
        return scale * (scale - 1) / np.maximum(np.linalg.norm(q / radii, axis=-1), 1e-6)

    return distance


def half_space(normal, offset):
    normal = normal / np.linalg.norm(normal)
    return lambda p: offset - p @ normal


def turned(solid, matrix, offset):
    """The solid at `offset`, its points seen through `matrix` (3, 3): a rotation, or a stretch that is near to one."""
    return lambda p: solid((p - offset) @ matrix)


def blend(width, *solids):
    """Union, its seams filled over about `width`."""

    def distance(p):
        return -width * np.logaddexp.reduce([-solid(p) / width * 4 for solid in solids], axis=0) / 4

    return distance


def cut(solid, other, width):
    """`solid` without `other`, the edge rounded over about `width`."""
    joined = blend(width, lambda p: -solid(p), other)
    return lambda p: -joined(p)


def rotation_about(axis, degrees):
    """(3, 3): by so many degrees about axis 0, 1 or 2."""
    turn, angle = np.eye(3), np.radians(degrees)
    one, other = (axis + 1) % 3, (axis + 2) % 3
    turn[one, one] = turn[other, other] = np.cos(angle)
    turn[one, other], turn[other, one] = -np.sin(angle), np.sin(angle)
    return turn


def random_rotation(rng):
    """(3, 3), every rotation as likely as any other."""
    q, r = np.linalg.qr(rng.standard_normal((3, 3)))
    q = q * np.sign(np.diag(r))
    return q if np.linalg.det(q) > 0 else -q
