"""Every operator and loss as a call on drawn inputs, for comparisons, sync checks and graphs alike.

The same function builds both sides of a comparison: on the device in some dtype, and in float64 on the CPU.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import moment_ops as mo
from bench.gpu.exactness import Close, Norm, Results
from moment_ops.losses.gram_distance import gram_distance
from moment_ops.ops.layout import statistics_dtype
from moment_ops.ops.moments import moments_backward
from moment_ops.ops.relu_moments import identity_moments, relu_moments
from moment_ops.training.moment_networks import SmallMomentNetwork

Shapes = tuple[tuple[int, ...], ...]
# Rows and layers: odd and aligned ones, rows that are split over blocks, more layers than one launch takes.
SIZES: dict[str, tuple[int, Shapes]] = {
    "odd": (9, ((5,), (3, 2, 2), (1,), (33,))),
    "aligned": (64, ((16, 4, 4), (8, 8, 8), (128,))),
    "two rows": (2, ((7,), (2, 3))),
    "one row": (1, ((7,), (1,), (64,))),
    "tall": (1100, ((3,), (6, 2, 2))),
    "many layers": (12, tuple((5 + i,) for i in range(70))),
    "small": (9, ((5,), (3, 2, 2))),
    "wide": (20, ((300,), (7, 5, 4))),
    "matrices": (300, ((130,), (7,), (64,))),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
AVERAGES = {"none": None, "moving": mo.MovingAverage(0.9), "adam": mo.AdamMovingAverage(lr=0.01)}
# What is promised of the precisions of products.
PRECISIONS = {"ieee": 1e-6, "bf16x3": 2e-5, "tf32": 1e-3, "bf16": 4e-3}


def _unaligned(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 2 else x


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": _channels_last,
    "unaligned": _unaligned,
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "batch innermost": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
}


class Draw:
    """Numbers that are the same on both sides: rounded to the dtype, and in float64 where they are to be exact."""

    def __init__(self, size: str, dtype: torch.dtype, layout: str, device: str, *, exact: bool = False) -> None:
        self.rows, self.shapes = SIZES[size]
        self.given_dtype, self.layout, self.device, self.exact = dtype, LAYOUTS[layout], device, exact
        self.dtype = torch.float64 if exact else dtype
        self.generator = torch.Generator().manual_seed(0)

    @property
    def columns(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    def _moved(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.to(dtype)
        return x.double() if self.exact else x.to(self.device)

    def features(self, rows: int | None = None, shapes: Shapes | None = None, grid: float = 0.0) -> list[Tensor]:
        """Layers whose columns differ in mean and spread, in the layout, with gradients.

        Args:
            grid: multiples of it alone, so that their sums need no rounding.
        """
        features = []
        for shape in shapes or self.shapes:
            noise = torch.randn((rows or self.rows, *shape), generator=self.generator, dtype=torch.float64)
            shift = torch.randn(shape, generator=self.generator, dtype=torch.float64)
            x = noise * (0.75 + torch.rand(shape, generator=self.generator, dtype=torch.float64)) + shift
            if grid:
                x = (x / grid).round() * grid
            features.append(self.layout(self._moved(x, self.given_dtype)).detach().requires_grad_())
        return features

    def like(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Gradients that arrive from elsewhere."""
        normal = partial(torch.randn, generator=self.generator, dtype=torch.float64)
        return [self._moved(normal(x.shape), self.given_dtype) for x in features]

    def vector(self, size: int, low: float = -1.0, high: float = 1.0) -> Tensor:
        """In the dtype of statistics."""
        values = torch.rand(size, generator=self.generator, dtype=torch.float64) * (high - low) + low
        return self._moved(values, statistics_dtype(self.given_dtype))

    def target(self, var: bool = True) -> mo.Moments:
        """Far from the features' moments, so that no difference is mere rounding."""
        mean = self.vector(self.columns, 5, 7)
        return mo.Moments(mean, self.vector(self.columns, 9, 12) if var else None, shapes=self.shapes)

    def matrix(self, width: int, diagonal: float = 0.0) -> Tensor:
        """Symmetric."""
        root = self.vector(width * width).view(width, width)
        return root + root.mT + diagonal * torch.eye(width, dtype=root.dtype, device=root.device)

    def module(self, module: nn.Module) -> nn.Module:
        """Parameters that are the same on both sides."""
        for parameter in module.parameters():
            value = torch.randn(parameter.shape, generator=self.generator, dtype=torch.float64) / 4
            parameter.data = value.to(torch.float32)
        return module.to(self.device, self.dtype)

    def loss(self, loss: nn.Module) -> nn.Module:
        return loss.to(self.device)


Call = Callable[[], Results]


def _all_close(terms: int, **groups: Any) -> Results:
    """Tensors by name; lists of them by name and number."""
    results: Results = {}
    for name, value in groups.items():
        if isinstance(value, Tensor):
            results[name] = Close(value, terms)
        else:
            results |= {f"{name} {i}": Close(part, terms) for i, part in enumerate(value)}
    return results


def _state(loss: nn.Module, terms: int) -> Results:
    return {name: Close(v, terms) for name, v in loss.state_dict().items() if not name.startswith("target")}


def moments(draw: Draw, correction: int = 1, var: bool = True) -> Call:
    features = draw.features()
    grads = [draw.vector(draw.columns) for _ in range(1 + var)]

    def call() -> Results:
        m = mo.moments(features, correction=correction, var=var)
        outputs = [m.mean, *([m.var] if m.var is not None else [])]
        return _all_close(draw.rows, outputs=outputs, grad=torch.autograd.grad(outputs, features, grads))

    return call


def moments_over_positions(draw: Draw) -> Call:
    (layer,) = draw.features(shapes=((6, 5, 4),))
    grads = [draw.vector(6), draw.vector(6)]

    def call() -> Results:
        m = mo.moments(layer, dim=(0, 2, 3))
        outputs = [m.mean, m.var]
        return _all_close(20 * draw.rows, outputs=outputs, grad=torch.autograd.grad(outputs, layer, grads))

    return call


def moments_backward_joined(draw: Draw) -> Call:
    """With gradients that arrive from elsewhere, and a scale."""
    features = [x.detach() for x in draw.features()]
    added, grads = draw.like(features), [draw.vector(draw.columns) for _ in range(2)]
    mean, scale = draw.vector(draw.columns), draw.vector(1).squeeze(0)
    count = torch.full((len(features),), draw.rows, dtype=torch.int64, device=mean.device)

    def call() -> Results:
        return _all_close(1, out=moments_backward(features, mean, count, *grads, grad=added, scale=scale))

    return call


def moment_loss(
    draw: Draw, average_kind: str, source: str = "features", weighted: bool = False, var: bool = True
) -> Call:
    features, target = draw.features(), draw.target(var)
    weights = {"mean_weight": draw.vector(draw.columns, 0.5, 2), "var_weight": 0.7} if weighted else {}
    loss = draw.loss(mo.MomentLoss(target, AVERAGES[average_kind], process_group=False, **weights))
    correction = 0 if source == "moments of another correction" else 1

    def call() -> Results:
        value = loss(features if source == "features" else mo.moments(features, correction=correction))
        grads = torch.autograd.grad(value, features)
        return {"loss": Close(value, draw.columns)} | _all_close(draw.rows, grad=grads) | _state(loss, draw.rows)

    return call


def tap(draw: Draw, biased: bool) -> Call:
    features = draw.features(grid=1 / 8)
    biases = [(8 * draw.vector(x.shape[1])).round() / 8 if biased else None for x in features]
    biases = [None if b is None else b.to(draw.dtype) for b in biases]
    grads = draw.like(features), [(draw.vector(x[0].numel()), draw.vector(x[0].numel())) for x in features]

    def call() -> Results:
        results: Results = {}
        for i, (x, bias, grad, vectors) in enumerate(zip(features, biases, *grads, strict=True)):
            outputs = relu_moments(x, bias)
            dx = torch.autograd.grad(outputs, x, [grad, *vectors])
            results |= _all_close(draw.rows, **{f"layer {i}, outputs": outputs, f"layer {i}, grad": dx})
        return results

    return call


def identity_tap(draw: Draw) -> Call:
    features = draw.features()
    grads = draw.like(features), [(draw.vector(x[0].numel()), draw.vector(x[0].numel())) for x in features]

    def call() -> Results:
        results: Results = {}
        for i, (x, grad, vectors) in enumerate(zip(features, *grads, strict=True)):
            outputs = identity_moments(x)
            dx = torch.autograd.grad(outputs, x, [grad, *vectors])
            results |= _all_close(draw.rows, **{f"layer {i}, outputs": outputs, f"layer {i}, grad": dx})
        return results

    return call


def extractor(draw: Draw) -> Call:
    """A small network with taps, and the loss on them."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()]
    tapped = mo.MomentExtractor(draw.module(nn.Sequential(*layers)))
    (images,) = draw.features(16, ((3, 8, 8),))
    shapes = ((8, 8, 8), (16, 4, 4))
    sizes = [torch.Size(shape).numel() for shape in shapes]
    target = mo.Moments(draw.vector(sum(sizes), 5, 7), draw.vector(sum(sizes), 9, 12), shapes=shapes)
    loss = draw.loss(mo.MomentLoss(target, AVERAGES["adam"], process_group=False))

    def call() -> Results:
        m = tapped(images)
        value = loss(m)
        (grad,) = torch.autograd.grad(value, images)
        return {"mean": Norm(m.mean, 1e-5), "var": Norm(m.var, 1e-5), "loss": Norm(value, 1e-5)} | {
            "grad": Norm(grad, 1e-4)
        }

    return call


def moment_network(draw: Draw) -> Call:
    """The generator's step of MoLM: a double backward through a network."""
    net = mo.MomentNetwork(draw.module(SmallMomentNetwork(1, 8, 2)))
    (images,) = draw.features(4, ((1, 8, 8),))

    def call() -> Results:
        mean = net.moments(images).mean
        (grad,) = torch.autograd.grad(mean.square().sum(), images)
        return {"mean": Norm(mean, 1e-4), "grad": Norm(grad, 1e-4)}

    return call


def covariance(draw: Draw, precision: str = "ieee", centered: bool = True) -> Call:
    features = draw.features()
    weights = [draw.matrix(x[0].numel()) for x in features]

    def call() -> Results:
        matrices = mo.covariance(features, precision=precision, centered=centered)
        grads = torch.autograd.grad(matrices, features, weights)
        bound = PRECISIONS[precision]
        results: Results = {f"covariance {i}": Norm(c, bound) for i, c in enumerate(matrices)}
        return results | {f"grad {i}": Norm(dx, 4 * bound) for i, dx in enumerate(grads)}

    return call


def covariance_loss(draw: Draw, average_kind: str, precision: str = "ieee") -> Call:
    features = draw.features()
    target = [draw.matrix(x[0].numel(), diagonal=6.0) for x in features]
    loss = mo.CovarianceLoss(target, average=AVERAGES[average_kind], precision=precision, process_group=False)
    loss = draw.loss(loss)

    def call() -> Results:
        value = loss(features)
        grads = torch.autograd.grad(value, features)
        bound = 4 * PRECISIONS[precision]
        results: Results = {f"grad {i}": Norm(dx, bound) for i, dx in enumerate(grads)}
        state = {name: Norm(v, 10 * bound) for name, v in loss.state_dict().items() if name.endswith("average")}
        return results | state | {"loss": Norm(value, bound)}

    return call


def distance_of_rows(draw: Draw, joint: bool = False, estimator: str = "biased") -> Call:
    features, other = draw.features(), draw.features(rows=draw.rows + 3)
    weight = [0.5] if joint else [0.5 + i for i in range(len(features))]
    options: dict[str, Any] = {"joint": joint, "estimator": estimator, "weight": weight}

    def call() -> Results:
        value = gram_distance(features, other, **options)
        grads = torch.autograd.grad(value, [*features, *other])
        results: Results = {f"grad {i}": Norm(dx, 1e-5) for i, dx in enumerate(grads)}
        return results | {"loss": Norm(value, 1e-5)}

    return call


def _of_two(draw: Draw, function: Callable[[Tensor, Tensor], Tensor], rows: int, width: int) -> Call:
    first, second = draw.features(rows, ((width,),) * 2)

    def call() -> Results:
        value = function(first, second)
        wanted = [x for x in (first, second) if x.requires_grad]
        grads = torch.autograd.grad(value, wanted, allow_unused=True)
        results: Results = {f"grad {i}": Norm(dx, 2e-5) for i, dx in enumerate(grads) if dx is not None}
        return results | {"loss": Norm(value, 2e-5)}

    return call


def published(draw: Draw, name: str) -> Call:
    """The published losses on two sets of embeddings."""
    if name == "style_loss":
        maps, style = draw.features(3, ((6, 5, 4),) * 2)

        def call() -> Results:
            value = mo.style_loss(maps, mo.gram_matrix(style).detach())
            return {"loss": Norm(value, 2e-5), "grad": Norm(torch.autograd.grad(value, maps)[0], 2e-5)}

        return call
    rows, width = (40, 12) if name.endswith("tall") else (10, 70)
    function = {
        "coral_loss": mo.coral_loss,
        "vicreg_variance": lambda x, y: mo.vicreg_variance(x, gamma=4.0) + mo.vicreg_variance(y, gamma=4.0),
        "vicreg_covariance": lambda x, y: mo.vicreg_covariance(x) + mo.vicreg_covariance(y),
        "frechet_distance": _frechet,
    }[name.partition(",")[0]]
    return _of_two(draw, function, rows, width)


def _frechet(x: Tensor, y: Tensor) -> Tensor:
    (cx, cy), m = mo.covariance([x, y]), mo.moments([x, y])
    (mx, _), (my, _) = m.layers()
    return mo.frechet_distance(mx, cx, my, cy)


@dataclass(frozen=True)
class Operator:
    """One way to call an operator.

    Args:
        family: the bench whose factors depend on it.
        sizes, layouts, dtypes: what it is tried on.
        waits: it is said to wait for the device.
        exact_repeats: equal to the last bit from call to call; convolutions of cuDNN promise no such thing.
    """

    family: str
    build: Callable[[Draw], Call]
    sizes: tuple[str, ...] = ("odd", "aligned")
    layouts: tuple[str, ...] = ("contiguous",)
    dtypes: tuple[str, ...] = tuple(DTYPES)
    waits: bool = False
    exact_repeats: bool = True


def _operators() -> dict[str, Operator]:
    everywhere = {"sizes": ("odd", "aligned", "two rows", "one row", "tall", "many layers"), "layouts": tuple(LAYOUTS)}
    matrices = {"sizes": ("small", "matrices"), "layouts": ("contiguous", "batch innermost")}
    networks = {"sizes": ("odd",), "dtypes": ("float32", "float64"), "exact_repeats": False}
    table = {
        "moments": Operator("moments", moments, **everywhere),
        "moments, means alone": Operator("moments", partial(moments, correction=0, var=False)),
        "moments over positions": Operator("moments", moments_over_positions, ("odd",), tuple(LAYOUTS)),
        "moments_backward, joined": Operator("moments", moments_backward_joined, layouts=tuple(LAYOUTS)),
        "relu_moments": Operator("relu_moments", partial(tap, biased=False), **everywhere),
        "relu_moments, bias": Operator("relu_moments", partial(tap, biased=True), layouts=tuple(LAYOUTS)),
        "identity_moments": Operator("relu_moments", identity_tap),
        "MomentExtractor": Operator("relu_moments", extractor, **networks),
        "MomentNetwork": Operator("moment_network", moment_network, **networks),
    }
    for average_kind in AVERAGES:
        loss = partial(moment_loss, average_kind=average_kind)
        table |= {
            f"MomentLoss, {average_kind}": Operator("match", loss, **everywhere),
            f"MomentLoss, {average_kind}, weights": Operator("match", partial(loss, weighted=True)),
            f"MomentLoss, {average_kind}, means alone": Operator("match", partial(loss, var=False), ("odd",)),
            f"MomentLoss, {average_kind}, of moments": Operator("match", partial(loss, source="moments")),
        }
    another = partial(moment_loss, average_kind="none", source="moments of another correction")
    table["MomentLoss, of moments of another correction"] = Operator("match", another, ("odd",))
    for precision in PRECISIONS:
        table[f"covariance, {precision}"] = Operator("covariance", partial(covariance, precision=precision), **matrices)
    table["second moments"] = Operator("covariance", partial(covariance, centered=False), ("small",))
    for average_kind in AVERAGES:
        matched = partial(covariance_loss, average_kind=average_kind)
        table[f"CovarianceLoss, {average_kind}"] = Operator("covariance", matched, **matrices)
    table["CovarianceLoss, none, bf16x3"] = Operator(
        "covariance", partial(covariance_loss, average_kind="none", precision="bf16x3"), ("matrices",)
    )
    table |= {
        "covariance_distance, gram": Operator(
            "gram", distance_of_rows, ("small", "wide"), ("contiguous", "batch innermost")
        ),
        "covariance_distance, gram, joint": Operator("gram", partial(distance_of_rows, joint=True), ("wide",)),
        "covariance_distance, gram, unbiased": Operator(
            "gram", partial(distance_of_rows, estimator="unbiased"), ("wide",)
        ),
        "style_loss": Operator("gram", partial(published, name="style_loss"), ("odd",)),
        "coral_loss, wide": Operator("gram", partial(published, name="coral_loss, wide"), ("odd",)),
        "coral_loss, tall": Operator("covariance", partial(published, name="coral_loss, tall"), ("odd",)),
        "vicreg_variance": Operator("moments", partial(published, name="vicreg_variance"), ("odd",)),
        "vicreg_covariance, tall": Operator("covariance", partial(published, name="vicreg_covariance, tall"), ("odd",)),
        "vicreg_covariance, wide": Operator("gram", partial(published, name="vicreg_covariance, wide"), ("odd",)),
        "frechet_distance": Operator(
            "covariance", partial(published, name="frechet_distance, tall"), ("odd",), waits=True
        ),
    }
    return table


OPERATORS = _operators()
