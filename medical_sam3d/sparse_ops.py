"""Operations on voxels of which most are absent: neighbours, convolution and its adapter, subdivision, normalisation.

N voxels are coords (N, 4) int [sample, x, y, z] and features (N, C). A convolution gathers rows of a table of neighbours and
multiplies; its gradients gather as well, since a voxel that I see at offset o sees me at -o. Semantics are those of spconv
2.3's submanifold convolutions (arXiv:1711.10275), by which the official weights were trained.
"""

import math
from functools import partial
from itertools import product

import torch
from torch import nn
from torch.nn import functional as F

from common.fast_lora import under_autocast
from common.lora import register_lora_layer
from common.lora_layers import LoRALayer

SIDE = 1024  # coordinates lie in 0 .. SIDE - 1
CENTRE = 13  # of the 27 offsets (-1, 0, 1)^3, z fastest; the opposite of offset j is 26 - j
# Bytes of gathered rows at a time: on a CPU what stays in its cache, on a GPU what keeps it busy.
GATHERED = {"cpu": 2**22, "cuda": 2**28}


# ---- which voxel is beside which --------------------------------------------------------------------------------------


def neighbours(coords: torch.Tensor) -> torch.Tensor:
    """(N, 27) int64: the row of the voxel at each offset (-1, 0, 1)^3, z fastest, in the same sample; N where there is none.

    coords (N, 4) integer [sample, x, y, z], rows in any order. ValueError for another shape or type, negative samples,
    coordinates outside 0 .. 1023, and a voxel that stands there twice.
    """
    keys = voxel_keys(coords)
    ordered, order = keys.sort()
    if bool((ordered[1:] == ordered[:-1]).any()):
        row = order[1:][ordered[1:] == ordered[:-1]][0]
        raise ValueError(f"voxel {coords[row].tolist()} stands there twice: each has one place")
    count = len(keys)
    table = keys.new_full((count + 1, 27), count)  # the last row takes what is written for the absent
    table[:-1, CENTRE] = rows = torch.arange(count, device=keys.device)
    for j, (x, y, z) in enumerate(list(product((-1, 0, 1), repeat=3))[:CENTRE]):
        wanted = keys + (x * (SIDE + 2) + y) * (SIDE + 2) + z
        place = torch.searchsorted(ordered, wanted).clamp(max=count - 1)
        found = order[place].where(ordered[place] == wanted, count)
        table[:-1, j] = found
        table[found, 26 - j] = rows  # whom I see at o sees me at -o
    return table[:-1]


def voxel_keys(coords: torch.Tensor) -> torch.Tensor:
    """(N,) int64: a number for each voxel that grows with [sample, x, y, z], and that of its neighbour by a fixed difference."""
    check_coords(coords, SIDE)
    sample, x, y, z = coords.long().unbind(1)
    side = SIDE + 2  # with a margin, so that no neighbour is the voxel of another line
    return ((sample * side + x + 1) * side + y + 1) * side + z + 1


def check_coords(coords: torch.Tensor, side: int) -> None:
    """ValueError unless these are (N, 4) whole numbers [sample, x, y, z] on a grid of side^3."""
    if coords.dim() != 2 or coords.shape[1] != 4 or coords.is_floating_point() or coords.dtype == torch.bool:
        raise ValueError(f"coords must be (N, 4) whole numbers [sample, x, y, z], not {tuple(coords.shape)} {coords.dtype}")
    outside = (coords[:, 1:] < 0).any(1) | (coords[:, 1:] >= side).any(1) | (coords[:, 0].long() >> 31 != 0)  # 0 .. 2^31 - 1
    if bool(outside.any()):
        found = coords[outside][0].tolist()
        raise ValueError(f"voxel {found}, [sample, x, y, z], lies outside a grid of {side} cells along an edge")


def subdivide(coords: torch.Tensor, feats: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each voxel's 8 children at 2 * coord + (0, 1)^3, z fastest, one after another, with their parent's features.

    coords (N, 4) -> (8 N, 4); feats (N, C) -> (8 N, C).
    """
    corners = torch.tensor(list(product((0,), (0, 1), (0, 1), (0, 1))), dtype=coords.dtype, device=coords.device)
    doubled = coords * coords.new_tensor([1, 2, 2, 2])
    return (doubled[:, None] + corners).flatten(0, 1), feats.repeat_interleave(8, 0)


def children_neighbours(table: torch.Tensor) -> torch.Tensor:
    """The table (8 N, 27) of the children, from their parents' (N, 27): a child is there where its parent is."""
    count = len(table)
    parents, parities = child_offsets(table.device)  # (8, 27) each
    found = pick(table, parents.flatten()).mul_(8).add_(parities.flatten())  # 216 numbers a voxel: worth no copies
    return found.clamp_(max=8 * count).view(8 * count, 27)


def pick(table: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """(N, K) columns of a table; in a sixth of the time of table[:, columns]."""
    return table.gather(1, columns.expand(len(table), -1))


def child_offsets(device) -> tuple[torch.Tensor, torch.Tensor]:
    """For each of 8 children and 27 offsets: at which of 27 offsets its parent's neighbour lies, and which child of it it is."""
    child = torch.tensor(list(product((0, 1), repeat=3)), device=device)
    offset = torch.tensor(list(product((-1, 0, 1), repeat=3)), device=device)
    place = child[:, None] + offset  # (8, 27, 3) in -1 .. 2
    parent, parity = place.div(2, rounding_mode="floor") + 1, place % 2
    return (parent * parent.new_tensor([9, 3, 1])).sum(-1), (parity * parity.new_tensor([4, 2, 1])).sum(-1)


# ---- convolution ------------------------------------------------------------------------------------------------------


class SparseConv3d(nn.Module):
    """A submanifold convolution under the official names: conv.weight (Cout, k, k, k, Cin), conv.bias (Cout,); k is 1 or 3."""

    def __init__(self, cin: int, cout: int, kernel: int = 3):
        super().__init__()
        self.conv = SubmanifoldConv(cin, cout, kernel)

    def forward(self, feats: torch.Tensor, table: torch.Tensor | None = None, children: bool = False) -> torch.Tensor:
        """feats (N, Cin), table (N, 27) of `neighbours` (k = 1 needs none) -> (N, Cout).

        children: feats and table are of the parents, and the output (8 N, Cout) is that of the voxels after `subdivide`.
        """
        return self.conv(feats, table, children)


class SubmanifoldConv(nn.Module):
    """y[p] = bias + sum over offsets o of W[o] x[p + o]: cross-correlation; what is absent counts as zero, and stays absent.

    k = 1 computes x @ weight.view(Cin, Cout): that is how spconv 2 reads the buffer of its (Cout, 1, 1, 1, Cin) weight, which
    is no transpose. The official weights were trained so, and shapes cannot tell.
    """

    def __init__(self, cin: int, cout: int, kernel: int):
        super().__init__()
        if kernel not in (1, 3):
            raise ValueError(f"a kernel of {kernel}: only 1 and 3 are there")
        self.weight = nn.Parameter(torch.empty(cout, kernel, kernel, kernel, cin))
        self.bias = nn.Parameter(torch.empty(cout))
        bound = 1 / math.sqrt(cin * kernel**3)  # of torch's own convolutions
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, feats, table=None, children: bool = False):
        return sparse_conv(feats, self.weight, self.bias, table, children)


def sparse_conv(feats, weight, bias, table=None, children: bool = False) -> torch.Tensor:
    """feats (N, Cin), weight (Cout, k, k, k, Cin), bias (Cout,) or None, table (N, 27) -> (N, Cout), or (8 N, Cout): children.

    Under autocast in its type. Differentiable once.
    """
    cout, kernel, *_, cin = weight.shape
    if kernel == 1:
        y = F.linear(feats, weight.reshape(cin, cout).t(), bias)
        return y.repeat_interleave(8, 0) if children else y
    if table is None or table.shape != (len(feats), 27):
        raise ValueError(f"{len(feats)} voxels need a table of neighbours ({len(feats)}, 27)")
    kernels = parity_kernels(weight) if children else weight.reshape(1, cout, 27, cin)
    feats, kernels, bias = under_autocast(feats, kernels, bias)
    return GatherConv.apply(feats, kernels, bias, table)


def parity_kernels(weight: torch.Tensor) -> torch.Tensor:
    """(8, Cout, 8, Cin): a 3^3 kernel as each of 8 children uses it, whose 27 neighbours have but 8 parents.

    Along an axis, child 0 sees parent -1 by offset -1 and its own by 0 and 1; child 1 its own by -1 and 0, and parent +1 by 1.
    """
    sums = weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # child, parent, offset
    with torch.autocast(weight.device.type, enabled=False):  # summed before it is rounded
        kernels = torch.einsum("aui,bvj,cwk,oijkn->abcouvwn", sums, sums, sums, weight)
    return kernels.reshape(8, weight.shape[0], 8, weight.shape[-1])


def parent_columns(device) -> torch.Tensor:
    """(8, 8): at which of 27 offsets the 8 parents of each child's neighbours lie, in the order of `parity_kernels`."""
    child = torch.tensor(list(product((0, 1), repeat=3)), device=device)
    return ((child[:, None] + child) * child.new_tensor([9, 3, 1])).sum(-1)


class GatherConv(torch.autograd.Function):
    """y[n P + p] = bias + sum over k of W[p, k] x[row(n, p, k)]; P = 1, K = 27: a convolution, P = K = 8: one after subdividing.

    x (N, C), W (P, O, K, C), bias (O,) or None, table (N, 27) -> (P N, O). dx gathers dy by the opposite offsets, dW multiplies
    dy with x gathered once more; nothing is scattered, and nothing of K times the size of x is kept.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, table):
        need_x, need_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_weight else None, weight if need_x or need_weight else None, table)
        phases, outputs, *_ = ctx.shape = weight.shape
        padded, y = with_zero_row(x), x.new_empty(len(x), phases, outputs)
        for p, columns in enumerate(columns_of(phases, x.device)):
            gather_product(padded, table, columns, weight[p].flatten(1), bias, y[:, p])
        return y.view(-1, outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, table = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        phases, outputs, taps, inputs = ctx.shape
        dx = dweight = None
        if need_x:  # phase p of the voxel at the opposite offset saw this one at tap k
            opposite = 26 - columns_of(phases, dy.device).flatten()
            phase = torch.arange(phases, device=dy.device).repeat_interleave(taps)
            rows = pick(table, opposite).mul_(phases).add_(phase).clamp_(max=len(dy))
            dx = dy.new_empty(len(table), inputs)
            gather_product(with_zero_row(dy), rows, None, weight.permute(3, 0, 2, 1).reshape(inputs, -1), None, dx)
        if need_weight:
            dweight = weight_gradient(x, dy.reshape(len(x), phases, outputs), weight, table)
        return dx, dweight, dy.sum(0) if need_bias else None, None


def columns_of(phases: int, device) -> torch.Tensor:
    """(P, K) columns of the table that each phase reads."""
    return torch.arange(27, device=device)[None] if phases == 1 else parent_columns(device)


def with_zero_row(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x.new_zeros(1, x.shape[1])])


def chunks(table: torch.Tensor, taps: int, row_bytes: int):
    """Slices of the table's rows whose gathered features stay within GATHERED bytes."""
    step = max(1, GATHERED.get(table.device.type, 2**28) // (taps * row_bytes))
    return [slice(start, start + step) for start in range(0, len(table), step)]


def gathered(padded, table, columns, part: slice) -> torch.Tensor:
    """(n, K C) features of the neighbours of some rows; columns None: all of the table's."""
    rows = table[part] if columns is None else pick(table[part], columns)
    return padded.index_select(0, rows.flatten()).view(len(rows), -1)


def gather_product(padded, table, columns, matrix, bias, out) -> None:
    """out (N, O) = gathered features (N, K C) times matrix (O, K C)^T, plus bias, without all of them at once."""
    taps = table.shape[1] if columns is None else len(columns)
    for part in chunks(table, taps, padded.shape[1] * padded.element_size()):
        features = gathered(padded, table, columns, part)
        out[part] = F.linear(features, matrix, bias)


def weight_gradient(x, dy, weight, table) -> torch.Tensor:
    """(P, O, K, C) = sum over rows of dy (N, P, O) times the features that each phase gathered of x (N, C)."""
    padded, grad = with_zero_row(x), at_least_float32(weight.new_zeros(weight.shape))
    phases, outputs, taps, inputs = weight.shape
    for p, columns in enumerate(columns_of(phases, x.device)):
        total = grad[p].view(outputs, taps * inputs)
        for part in chunks(table, taps, inputs * x.element_size()):
            total += dy[part, p].t() @ gathered(padded, table, columns, part)
    return grad.to(weight.dtype)


@partial(register_lora_layer, SubmanifoldConv)
class LoRASparseConv(LoRALayer):
    """A (r, k^3 Cin) sees the neighbourhood, B (Cout, r) only its voxel: r (k^3 Cin + Cout) parameters."""

    def make_pair(self, base):
        cout, kernel, *_, cin = base.weight.shape
        return nn.Linear(kernel**3 * cin, self.r, bias=False), nn.Linear(self.r, cout, bias=False)

    def product(self):
        """B A in the shape of the weight; for k = 1 in its reading as (Cin, Cout), which is A^T B^T."""
        update = self.lora_B.weight @ self.lora_A.weight
        shape = self.base_layer.weight.shape
        return (update.t() if shape[1] == 1 else update).reshape(shape)

    @staticmethod
    def matrix(layer, weight):
        """(1, Cout, k^3 Cin)."""
        cout, kernel, *_, cin = weight.shape
        return (weight.view(cin, cout).t() if kernel == 1 else weight.view(cout, -1))[None]

    def branch(self, feats, table=None, children=False):
        feats, kernel = self.lora_dropout(feats.to(self.lora_A.weight.dtype)), self.base_layer.weight.shape[1]
        if kernel == 1:
            y = self.lora_B(self.lora_A(feats) * self.scaling)
            return y.repeat_interleave(8, 0) if children else y
        down = self.lora_A.weight.view(self.r, 3, 3, 3, -1)
        return self.lora_B(sparse_conv(feats, down, None, table, children) * self.scaling)


# ---- normalisation ----------------------------------------------------------------------------------------------------


def group_norm_per_sample(feats, sizes: list[int], groups: int, weight, bias, eps: float = 1e-5) -> torch.Tensor:
    """Group normalisation over all voxels of each sample, at least in float32.

    feats (N, C), samples one after another, of these sizes. Neither order nor the other samples change what one gives.
    """
    feats = at_least_float32(feats)
    with torch.autocast(feats.device.type, enabled=False):
        parts = [normalise_group(part, groups, weight, bias, eps) for part in feats.split(sizes) if len(part)]
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else feats


def normalise_group(part, groups: int, weight, bias, eps: float) -> torch.Tensor:
    """One sample's (n, C), as a picture of n x 1 in channels-last order, which torch normalises without a copy."""
    weight, bias = weight.to(part.dtype), bias.to(part.dtype)
    return F.group_norm(part.t()[None, :, :, None], groups, weight, bias, eps)[0, :, :, 0].t()


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
