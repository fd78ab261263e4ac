"""What a cube's case means: which of its edges the surface crosses, and which crossings belong to one sheet of it.

Corner k of a cube lies at (k & 1, k >> 1 & 1, k >> 2 & 1) along x, y, z; case c has bit k set where corner k is inside. The
tables follow from that by the rules of the manifold dual marching cubes (Wenger 2013) that FlexiCubes (arXiv:2308.05371) uses,
with its order of edges, which says which of the decoder's weights belongs to which edge.
"""

from functools import cache
from typing import NamedTuple

import torch

CUBE_CORNERS = tuple((k & 1, k >> 1 & 1, k >> 2 & 1) for k in range(8))
# (from, to) corners: around the face y = 0, around the face y = 1, and from the latter to the former. Edges along x and z go
# up, those along y down, so that an edge's direction is always the cross product of the other two axes in their order.
CUBE_EDGES = ((0, 1), (1, 5), (4, 5), (0, 4), (2, 3), (3, 7), (6, 7), (2, 6), (2, 0), (3, 1), (7, 5), (6, 4))
# Face 2 * axis + side: its corners.
CUBE_FACES = tuple(tuple(k for k in range(8) if k >> axis & 1 == side) for axis in range(3) for side in range(2))
MOSTLY_INSIDE = 5  # corners: from there on, an ambiguous face between two such cubes is cut the other way


class CubeTables(NamedTuple):
    """Of each case and each edge: int64 tensors, -1 where there is nothing to say."""

    group: torch.Tensor  # (256, 12): which sheet of the surface, 0.., the crossing of an edge belongs to
    groups: torch.Tensor  # (256,): how many sheets, 0 to 4
    doubtful: torch.Tensor  # (256,): the face 2 * axis + side whose neighbour decides whether case 255 - c says the groups
    ends: torch.Tensor  # (12, 2): the corners of an edge, as CUBE_EDGES
    axis: torch.Tensor  # (12,): along which an edge is
    place: torch.Tensor  # (12,): where the cube is among the four around its edge


def edge_axis(edge: int) -> int:
    return (CUBE_EDGES[edge][0] ^ CUBE_EDGES[edge][1]).bit_length() - 1


def edge_place(edge: int) -> int:
    """0..3: where the cube lies among the four around one of its edges, counter-clockwise around the edge's direction."""
    first, second = (CUBE_EDGES[edge][0] >> axis & 1 for axis in range(3) if axis != edge_axis(edge))
    return (0, 1, 3, 2)[first + 2 * second]


def crossings(case: int, corners=range(8)) -> list[int]:
    """The edges between an inside and an outside corner, of those that lie within `corners`."""
    return [
        edge for edge, (a, b) in enumerate(CUBE_EDGES) if a in corners and b in corners and (case >> a & 1) != (case >> b & 1)
    ]


def joined(case: int) -> list[list[int]]:
    """Pairs of crossings that lie on one sheet: the two of a face; of an ambiguous face's four those beside an inside corner."""
    pairs = []
    for face in CUBE_FACES:
        found = crossings(case, face)
        inside = [corner for corner in face if case >> corner & 1]
        pairs += [found] if len(found) == 2 else []
        pairs += [[edge for edge in found if corner in CUBE_EDGES[edge]] for corner in inside] if len(found) == 4 else []
    return pairs


def sheets(case: int) -> list[list[int]]:
    """The crossings of a case, joined ones together."""
    found = [{edge} for edge in crossings(case)]
    for pair in joined(case):
        touched = [sheet for sheet in found if sheet & set(pair)]
        found = [sheet for sheet in found if sheet not in touched] + [set().union(*touched)]
    return sorted(sorted(sheet) for sheet in found)


def doubtful_face(case: int) -> int:
    """The only ambiguous face of a case with few corners outside, else -1.

    Where both cubes beside such a face are of this kind, inside corners that stay apart would give two sheets the same vertices
    of one cube (a non-manifold edge): both cubes then join them.
    """
    ambiguous = [face for face, corners in enumerate(CUBE_FACES) if len(crossings(case, corners)) == 4]
    return ambiguous[0] if len(ambiguous) == 1 and case.bit_count() >= MOSTLY_INSIDE else -1


@cache
def cube_tables(device="cpu") -> CubeTables:
    group = torch.full((256, 12), -1)
    for case in range(256):
        for number, sheet in enumerate(sheets(case)):
            group[case, sheet] = number
    doubtful = [doubtful_face(case) for case in range(256)]
    edges = CUBE_EDGES, [edge_axis(edge) for edge in range(12)], [edge_place(edge) for edge in range(12)]
    tables = CubeTables(group, group.amax(1) + 1, torch.tensor(doubtful), *map(torch.tensor, edges))
    return CubeTables(*(table.to(device) for table in tables))
