"""`MomentNetwork`: means of hidden units, parameter gradients and input of a network that learns."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from moment_ops.distributed import ProcessGroup, group_size, mean_of_sums, mean_over_ranks
from moment_ops.input_gradients import of_input_alone
from moment_ops.losses.weights import weight_number
from moment_ops.ops import checks
from moment_ops.ops.layout import statistics_dtype
from moment_ops.ops.nodes import below_transforms, wants_grad
from moment_ops.statistics import Moments, moments
from moment_ops.taps import activations
from moment_ops.taps.hooks import Calls, errors_about
from moment_ops.taps.selection import Layers, Selection

GROUPS = ("hidden", "gradient", "input")
PENALTIES = ("real", "generated", "alternating", "both")
_LINEAR = (nn.Linear, nn.modules.conv._ConvNd)


class ObjectiveParts(NamedTuple):
    """The objective of a moment network and its parts, which are scalars. All but `loss` are detached.

    Attributes:
        loss: the sum of the logistic loss and the penalty.
        logistic: the logistic loss. It is 2 log 2 = 1.386 if f does not tell real from generated samples.
        penalty: the penalty, multiplied by its weight.
        squared_norm: squared norm of the mean gradient, averaged over the penalised batches.
        accuracy: share of samples whose value has the right sign. Real and generated samples count equally.
    """

    loss: Tensor
    logistic: Tensor
    penalty: Tensor
    squared_norm: Tensor
    accuracy: Tensor


class MomentNetwork(nn.Module):
    """A network f with one value per sample, and its moments: the Method of Learned Moments.

    The moments are the mean over samples of `Phi(x) = [hidden units h(x), gradient of f(x) with respect to the
    parameters of f, x]`. A generator is trained to match the mean over its samples to the mean over the data. In
    between, `objective` trains f to tell real samples from generated ones.

        target = mo.dataset_moments(net.moments, batches)
        average = mo.AdamMovingAverage(5e-3, reduction="sum")
        loss_fn = mo.MomentLoss(target, average, mean_weight=net.mean_weight(target), reduction="sum")
        loss_fn(net.moments(generator(latent))).backward()

    Args:
        f: a module that maps (N, ...) to (N,) or (N, 1). All of its parameters must require grad. Any optimizer may
            train it. A compiled module is unwrapped, since torch.compile does not support double backward.
        hidden: the layers whose outputs are moments. Either module types, where an activation's type includes calls of
            its function such as `torch.nn.functional.leaky_relu`; or names, of one call ("act:1") or of a module
            ("act", which selects all its calls); or a predicate (name, module) -> bool. By default all activations are
            selected.
        weights: weights of the groups "hidden", "gradient" and "input" in the matching loss, 1 by default. A weight
            multiplies squared distances. Moments, and the state of an average, are not scaled. `mean_weight` returns
            the weights in the form that a loss takes.

    Moments are computed with f in evaluation mode. In training mode, BatchNorm would make them depend on the other
    samples of the batch.

    With several processes, wrap the generator in DistributedDataParallel, not f. `MomentLoss` merges these moments.

    Leave out the bias of the last layer. Its gradient is 1 for all samples, so that the generator learns nothing from
    it. With the penalty around a squared norm of 1 it drives all other gradients to 0. A warning names such a
    parameter.

    Raises:
        TypeError, ValueError: f is not a module, has no parameters, or has one that does not require grad; wrong
            `hidden` or `weights`.

    Source: Ravuri, Mohamed, Rosca, Vinyals 2018, "Learning Implicit Generative Models with the Method of Learned
    Moments". The weights, and averages of these moments, are additions.
    """

    def __init__(
        self, f: nn.Module, hidden: Layers = activations.HIDDEN, weights: Mapping[str, float] | None = None
    ) -> None:
        super().__init__()
        if not isinstance(f, nn.Module):
            raise TypeError(f"f: got {type(f).__name__}, expected a Module")
        self.f: nn.Module = getattr(f, "_orig_mod", f)
        self.weights = _checked_weights(weights)
        with errors_about("hidden"):
            self._selection = Selection(hidden)
        self._steps = 0
        self._is_checked = False
        self._shapes: tuple[tuple[int, ...], ...] = ()
        self._names: tuple[str, ...] = ()
        self._parameters_by_name()

    def moments(self, x: Tensor) -> Moments:
        """Means over the batch of the hidden units, the parameter gradients and the input, packed in this order.

        Args:
            x: (N, ...) input of f.

        Returns:
            Moments without variances, float32 (float64 for float64). Layers are named "hidden/NAME" in execution order,
            then "gradient/NAME", then "input". Differentiable with respect to x through all three groups: twice in
            eager mode, once under the transforms of `torch.func`. Backward does not reach the parameters of f.

        Raises:
            ValueError: no rows, unless there are several processes (see `moment_ops.moments`); f does not return one
                value per sample, does not use one of its parameters, or has one that does not require grad; a layer is
                not twice differentiable; nothing matches `hidden`. The message names it.

        Cost: a forward and a backward of f. Backward is a double backward through f without the gradients of its
        parameters. No gradients per sample are computed: the gradient of the mean is the mean of the gradients. If x
        does not require grad, no graph is built.
        """
        checks.batch(checks.features(x, "x"), 0, "x", empty=None)
        if torch.is_grad_enabled() and wants_grad(x):
            mean = of_input_alone(self._means, x, list(self.f.parameters()))
            below_transforms(self._check_once, x)
        else:
            mean = self._means(x.detach(), create_graph=False)
        if not x.shape[0]:
            # The gradient of the mean over no rows is a sum of nothing.
            mean = mean + float("nan")
        count = x.new_full((len(self._shapes),), x.shape[0], dtype=torch.int64)
        return Moments(mean, count=count, shapes=self._shapes, names=self._names, validate=False)

    def forward(self, x: Tensor) -> Moments:
        """`moments(x)`."""
        return self.moments(x)

    def mean_weight(self, target: Moments) -> tuple[float, ...]:
        """The weights of the groups as `MomentLoss` takes them: one float per layer of these moments.

        Args:
            target: moments of this network, whose names give the groups.

        Raises:
            ValueError: the target has no names.
        """
        if target.names is None:
            raise ValueError("target: got Moments without names, expected the moments of this network")
        return tuple(self.weights[name.partition("/")[0]] for name in target.names)

    def objective(self, real: Tensor, generated: Tensor, **options: Any) -> Tensor:
        """The loss that trains f: `objective_parts(...).loss`, with the same arguments."""
        return self.objective_parts(real, generated, **options).loss

    def objective_parts(
        self,
        real: Tensor,
        generated: Tensor,
        *,
        penalty: str = "alternating",
        penalty_weight: float = 3e-3,
        squared_norm: float = 1.0,
        process_group: ProcessGroup = False,
    ) -> ObjectiveParts:
        """The logistic loss of real against generated samples, and a penalty on the norm of the mean gradient.

        `mean softplus(-f(real)) + mean softplus(f(generated)) + penalty_weight * (|g|^2 - squared_norm)^2`, where g is
        the gradient, with respect to the parameters of f, of the mean of f over one batch.

        Args:
            real, generated: (N, ...) and (M, ...) samples. They get no gradients.
            penalty: the batch whose g is penalised. "real" does not bound gradients on generated samples. "generated"
                penalises generated samples. "both" takes the mean of the two penalties. "alternating" switches between
                real and generated samples at every call in `train()` mode, at half the cost of "both"; the state dict
                holds whose turn it is.
            penalty_weight: weight of the penalty. If it is too large, f does not learn.
            squared_norm: the value of |g|^2 that has no penalty.
            process_group: the objective is that of the samples of all processes in this group, some of which may have
                none. None is the default group if torch.distributed is initialized, False is this process alone. The
                result is the same on every process. The gradients of the parameters, averaged over the processes, are
                those of one process with all samples.

        Returns:
            ObjectiveParts. `loss` is differentiable with respect to the parameters of f.

        Raises:
            ValueError: wrong shapes or options; f as in `moments`.

        Cost: two forwards of f and, for each penalised batch, a backward. The backward of the loss is two backwards of
        f, and a double backward for each penalised batch. Over several processes one collective for every penalised
        batch, and one more.

        Source: Ravuri et al. 2018, Algorithm 1. Published code penalises real samples only.
        """
        checks.option(penalty, "penalty", PENALTIES)
        world = group_size(process_group)
        for name, x in (("real", real), ("generated", generated)):
            checks.batch(checks.features(x, name), 0, name, empty=False if world == 1 else None)
        real_values = self._values(real.detach(), "real")
        generated_values = self._values(generated.detach(), "generated")
        if len(real):
            self._check_once(real)
        penalised = [penalty] if penalty in ("real", "generated") else ["real", "generated"]
        if penalty == "alternating":
            penalised = [penalised[self._steps % 2]]
        if self.training:
            self._steps += 1
        values = {"real": real_values, "generated": generated_values}
        norms = [_squared_norm(self._mean_gradients(values[name], process_group)) for name in penalised]
        losses = functional.softplus(-real_values), functional.softplus(generated_values)
        right = (real_values > 0).double(), (generated_values < 0).double()
        if world > 1:
            logistic = sum(mean_over_ranks(losses, process_group), real_values.new_zeros(()))
            accuracy = torch.stack(mean_over_ranks(right, process_group)).mean()
        else:
            logistic = losses[0].mean() + losses[1].mean()
            accuracy = (right[0].mean() + right[1].mean()) / 2
        norm = torch.stack(norms)
        weighted = penalty_weight * (norm - squared_norm).square().mean()
        return ObjectiveParts(
            logistic + weighted, logistic.detach(), weighted.detach(), norm.detach().mean(), accuracy.detach()
        )

    @torch.no_grad()
    def rescale(self, x: Tensor, squared_norm: float = 1.0) -> None:
        """Rescale the layers of an untrained f to data, so that |g|^2 = squared_norm and outputs have a similar scale.

        First the weight and bias of every linear layer and convolution are scaled so that its output on x has mean
        square 1. Then all of them are scaled by a common factor, so that g, the gradient of the mean of f over x, has
        the given squared norm, to 0.1 % (3 % in bfloat16). With PyTorch's initialisation this norm is often tens or
        hundreds, and the penalty then dominates the loss.

        Args:
            x: (N, ...) samples of the data. A few hundred are enough.
            squared_norm: |g|^2 after rescaling.

        Raises:
            ValueError: f has no linear layer or convolution, one of them returns only zeros, or the norm cannot be
                reached.

        Source: the first part is that of Mishkin & Matas 2016, without their orthogonal initialisation.
        """
        checks.batch(checks.features(x, "x"), 0, "x")
        layers = self._normalize(x)
        scaled = {id(p): p for layer in layers for p in layer.parameters(recurse=False)}
        constants = self._constant_gradients(x)
        constant = _squared_norm(constants.values()).item()
        if constant >= squared_norm:
            names = ", ".join(constants)
            raise ValueError(
                f"squared_norm: got {squared_norm}, but the gradient of {names} is the same for all samples, and its"
                f" squared norm alone is {constant:g}; remove this parameter from f"
            )
        # A network of n layers without biases is homogeneous: scaling all by c scales the gradient by c^(n-1).
        exponent = 1 / (2 * max(len(layers) - 1, 1))
        tolerance = max(1e-3, 4 * max(torch.finfo(p.dtype).eps for p in scaled.values()))
        for _ in range(100):
            with _evaluation_mode(self.f):
                norm = _squared_norm(self._gradients(self._values(x), create_graph=False)).item()
            if not math.isfinite(norm) or norm <= constant:
                break
            if abs(norm / squared_norm - 1) < tolerance:
                return
            factor = ((squared_norm - constant) / (norm - constant)) ** exponent
            torch._foreach_mul_(list(scaled.values()), factor)
        raise ValueError(f"squared_norm: got {squared_norm}, but rescaling the layers of f reaches only {norm:g}")

    def get_extra_state(self) -> dict[str, int]:
        return {"steps": self._steps}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self._steps = state["steps"]

    def extra_repr(self) -> str:
        return f"weights={self.weights}"

    def _parameters_by_name(self) -> dict[str, nn.Parameter]:
        found = dict(self.f.named_parameters())
        if not found:
            raise ValueError(f"f: {type(self.f).__name__} has no parameters, expected some whose gradients are moments")
        for name, parameter in found.items():
            if not parameter.requires_grad:
                raise ValueError(f"f: parameter {name} does not require grad, but its gradient is a moment")
        return found

    def _values(self, x: Tensor, name: str = "x") -> Tensor:
        """f(x) as (N,), with a graph."""
        with torch.enable_grad():
            output = self.f(x)
        if not isinstance(output, Tensor):
            raise TypeError(f"f: {type(self.f).__name__} returned {type(output).__name__}, expected a Tensor")
        rows = x.shape[0]
        if tuple(output.shape) not in ((rows,), (rows, 1)):
            raise ValueError(
                f"f: {type(self.f).__name__} returned shape {tuple(output.shape)} for {name} of shape"
                f" {tuple(x.shape)}, expected one value per sample, ({rows},) or ({rows}, 1)"
            )
        with torch.enable_grad():
            return output.view(rows).to(statistics_dtype(output.dtype))

    def _mean_gradients(self, values: Tensor, process_group: ProcessGroup) -> list[Tensor]:
        """The gradient of the mean of f over the samples of all processes, with a graph."""
        if group_size(process_group) == 1:
            return self._gradients(values, create_graph=True)
        return mean_of_sums(self._gradients(values, create_graph=True, total=True), len(values), process_group)

    def _gradients(self, values: Tensor, create_graph: bool, total: bool = False) -> list[Tensor]:
        """The gradient of the mean of f, or of its sum, with respect to every parameter."""
        parameters = self._parameters_by_name()
        with torch.enable_grad(), torch.autocast(values.device.type, enabled=False):
            value = values.sum() if total else values.mean()
            gradients = torch.autograd.grad(
                value, list(parameters.values()), create_graph=create_graph, allow_unused=True
            )
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                raise ValueError(f"f: parameter {name} is not used by {type(self.f).__name__}, and has no gradient")
        return [gradient for gradient in gradients if gradient is not None]

    def _means(self, x: Tensor, create_graph: bool) -> Tensor:
        """Packed means, with a graph to x and to the parameters, or without a graph."""
        with torch.enable_grad(), _evaluation_mode(self.f):
            calls = Calls(self.f, self._selection, x.shape[0])
            with calls:
                values = self._values(x)
            calls.check()
            features = [*calls.features, x]
            # Before the backward, which without a graph then frees activations as it goes.
            with torch.set_grad_enabled(create_graph):
                means = _means_of(features)
            gradients = self._gradients(values, create_graph)
            # The copy takes 0.3 % of a step (4.9 million columns, CPU). One vector is matched in one launch.
            with torch.set_grad_enabled(create_graph):
                *hidden, last = means
                packed = torch.cat([*hidden, *(g.reshape(-1).to(last.dtype) for g in gradients), last])
        self._shapes = (
            *(tuple(y.shape[1:]) for y in calls.features),
            *(tuple(g.shape) for g in gradients),
            tuple(x.shape[1:]),
        )
        parameters = (f"gradient/{name}" for name in self._parameters_by_name())
        self._names = (*(f"hidden/{name}" for name in calls.names), *parameters, "input")
        return packed

    def _constant_gradients(self, x: Tensor) -> dict[str, Tensor]:
        """Gradients that depend neither on x nor on parameters, by the name of their parameter."""
        with _evaluation_mode(self.f):
            inner = x.detach()[:2].clone().requires_grad_()
            gradients = self._gradients(self._values(inner), create_graph=True)
        pairs = zip(self._parameters_by_name(), gradients, strict=True)
        return {name: gradient for name, gradient in pairs if not gradient.requires_grad}

    def _normalize(self, x: Tensor) -> list[nn.Module]:
        """Scale every linear layer so that its output has mean square 1. Returns the layers in execution order."""
        names = {module: name for name, module in self.f.named_modules()}
        done: list[nn.Module] = []

        def normalize(layer: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            if layer in done:
                return None
            size = output.square().mean().sqrt().item()
            if not (math.isfinite(size) and size > 0):
                raise ValueError(
                    f"x: the outputs of layer {names[layer] or type(layer).__name__} of f have a root mean square of"
                    f" {size:g}, expected a positive, finite one"
                )
            done.append(layer)
            for parameter in layer.parameters(recurse=False):
                parameter.div_(size)
            return output / size

        handles = [module.register_forward_hook(normalize) for module in names if isinstance(module, _LINEAR)]
        try:
            with _evaluation_mode(self.f):
                self.f(x)
        finally:
            for handle in handles:
                handle.remove()
        if not done:
            raise ValueError(f"f: {type(self.f).__name__} has no linear layer or convolution to rescale")
        return done

    def _check_once(self, x: Tensor) -> None:
        """Check at first use that f is twice differentiable, and warn of constant gradients."""
        if self._is_checked:
            return
        with torch.enable_grad(), _evaluation_mode(self.f):
            inner = x.detach()[:2]
            if _second_derivative_error(self.f, (inner,), {}) is not None:
                layer, reason = _once_differentiable_layer(self.f, inner)
                raise ValueError(
                    f"f: {layer} is not twice differentiable, so that the parameter gradients of f have no derivative"
                    f" with respect to its input: {reason}"
                ) from reason
            constant = self._constant_gradients(x)
        if constant:
            warnings.warn(
                f"the gradient of {', '.join(constant)} is the same for all samples. A generator learns nothing from"
                " it. Its share of the squared norm is constant, so that the penalty drives the other gradients to 0."
                " Remove the bias of the last layer.",
                stacklevel=4,
            )
        self._is_checked = True


def _checked_weights(weights: Mapping[str, float] | None) -> dict[str, float]:
    given = {} if weights is None else weights
    if not isinstance(given, Mapping):
        raise TypeError(f"weights: got {type(given).__name__}, expected a mapping from {', '.join(GROUPS)} to numbers")
    for group, weight in given.items():
        if group not in GROUPS:
            raise ValueError(f"weights: got the key {group!r}, expected {', '.join(GROUPS)}")
        weight_number(weight, f"weights[{group!r}]")
    return {group: float(given.get(group, 1.0)) for group in GROUPS}


def _means_of(features: Sequence[Tensor]) -> list[Tensor]:
    """Means over the batch of every layer, flattened: in one launch, or in one per layer if autocast mixes dtypes.

    With convolutions this takes 0.2 % of a step, so that taps, which would save the read, gain nothing here.
    """
    if len({x.dtype for x in features}) == 1:
        result = moments(list(features), var=False)
        return list(result.mean.split(result.sizes))
    means = [moments(x, var=False).mean for x in features]
    return [mean.to(means[-1].dtype) for mean in means]


def _squared_norm(gradients: Any) -> Tensor:
    wide = [gradient.to(statistics_dtype(gradient.dtype)) for gradient in gradients]
    squares = [(gradient * gradient).sum() for gradient in wide]
    return torch.stack(squares).sum() if squares else torch.zeros(())


@contextmanager
def _evaluation_mode(f: nn.Module) -> Iterator[None]:
    training = [module for module in f.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _once_differentiable_layer(f: nn.Module, x: Tensor) -> tuple[str, RuntimeError | None]:
    """The innermost module that is not twice differentiable, by name and type, and the reason."""
    names = {module: name for name, module in f.named_modules()}
    calls: list[tuple[nn.Module, Any, Any]] = []

    def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((module, args, kwargs))

    handles = [module.register_forward_hook(record, with_kwargs=True) for module in names]
    try:
        f(x)
    finally:
        for handle in handles:
            handle.remove()
    # Inner calls end before outer ones; the call of f itself ends last.
    for module, args, kwargs in calls:
        reason = _second_derivative_error(module, args, kwargs)
        if reason is not None:
            break
    return f"layer {names[module]} ({type(module).__name__})" if names[module] else type(module).__name__, reason


def _second_derivative_error(module: nn.Module, args: Any, kwargs: Any) -> RuntimeError | None:
    """The error of a double backward through one call, or None. The module and its parameters do not change."""

    def is_floating(value: Any) -> bool:
        return isinstance(value, Tensor) and value.is_floating_point()

    leaves = {name: p.detach().requires_grad_() for name, p in module.named_parameters() if is_floating(p)}
    inputs = [a.detach().requires_grad_() if is_floating(a) else a for a in args]
    # Copies: a module may change its inputs in place.
    copies = [a.clone() if is_floating(a) else a for a in inputs]
    output = torch.func.functional_call(module, leaves, tuple(copies), kwargs)
    if not isinstance(output, Tensor) or not output.requires_grad:
        return None
    variables = [*leaves.values(), *(a for a in inputs if is_floating(a))]
    # Squared, so that the incoming gradient requires grad. With a constant one, functions that are differentiable once
    # return constant gradients, and do not raise.
    first = torch.autograd.grad(output.square().sum(), variables, create_graph=True, allow_unused=True)
    total = _squared_norm([g for g in first if g is not None])
    try:
        # To all leaves: a backward to some of them would skip the nodes that raise.
        total.backward()
    except RuntimeError as error:
        return error
    return None
