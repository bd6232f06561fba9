"""What the operators are compared with: the same moments and the same loss, written in PyTorch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Reduction = Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]]

LR, BETAS, EPS = 1e-5, (0.5, 0.999), 1e-8


def concatenated(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance of one (N, F) matrix, as in the published code."""
    rows = torch.cat([x.view(x.shape[0], -1) for x in features], dim=1).float()
    return torch.mean(rows, 0), torch.var(rows, 0)


def per_layer(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`mean` and `var` of every layer: the obvious code."""
    wide = [x.flatten(1).float() for x in features]
    return torch.cat([x.mean(0) for x in wide]), torch.cat([x.var(0) for x in wide])


def sums_of_squares(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and mean of squares of every layer: the fastest in eager mode, but it cancels where |mean| >> std."""
    rows = features[0].shape[0]
    wide = [x.flatten(1).float() for x in features]
    mean = torch.cat([x.mean(0) for x in wide])
    mean_square = torch.cat([x.square().mean(0) for x in wide])
    return mean, (mean_square - mean.square()) * (rows / (rows - 1))


class Original(nn.Module):
    """The loss of a GFMN step in the order of the published code.

    Features are concatenated first; the averages are weights of linear layers, moved by `torch.optim.Adam` on the mean
    squared error; losses are read for the log. They start at zero here, so that gradients can be compared.

    Source: dos Santos et al. 2019, released code, the branch of the ADAM moving average.
    """

    def __init__(self, target_mean: Tensor, target_var: Tensor) -> None:
        super().__init__()
        self.targets = target_mean, target_var
        self.nets = nn.ModuleList(nn.Linear(len(target_mean), 1, bias=False) for _ in range(2)).to(target_mean.device)
        for net in self.nets:
            nn.init.zeros_(net.weight)
        self.optimizers = [torch.optim.Adam(net.parameters(), lr=LR, betas=BETAS, eps=EPS) for net in self.nets]
        self.mse = nn.MSELoss()
        self.logged = 0.0

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        for net in self.nets:
            net.zero_grad()
        rows = torch.cat([x.view(x.shape[0], -1) for x in features], dim=1).float()
        moments = []
        for statistic, target, net, optimizer in zip(
            (torch.mean, torch.var), self.targets, self.nets, self.optimizers, strict=True
        ):
            moment = statistic(rows, 0)
            difference = target.detach() - moment.detach()
            error = self.mse(net.weight, difference.view(1, -1))
            error.backward()
            self.logged += error.item()
            optimizer.step()
            moments.append(moment)
        losses = []
        for moment, target, net in zip(moments, self.targets, self.nets, strict=True):
            loss = net(target.view(1, -1)).detach() - net(moment.view(1, -1))
            self.logged += loss.item()
            losses.append(loss)
        return (losses[0] + losses[1]).squeeze()


class PackedAdamMovingAverage(nn.Module):
    """One step of Adam on the mean squared error between the average and a difference, on packed vectors."""

    def __init__(self, columns: int, device: torch.device) -> None:
        super().__init__()
        for name in ("average", "exp_avg", "exp_avg_sq"):
            self.register_buffer(name, torch.zeros(columns, device=device))
        # A tensor, as torch.compile would compile every number of steps anew; integer, as it takes a float64 scalar
        # for a constant.
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))

    def forward(self, difference: Tensor) -> Tensor:
        self.steps.add_(1)
        steps = self.steps.double()
        grad = (self.average - difference).mul_(2 / len(difference))
        self.exp_avg.lerp_(grad, 1 - BETAS[0])
        self.exp_avg_sq.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
        step_size = (LR / (1 - BETAS[0] ** steps)).float()
        root_bias_correction2 = (1 - BETAS[1] ** steps).sqrt().float()
        denominator = self.exp_avg_sq.sqrt().div_(root_bias_correction2).add_(EPS)
        self.average.sub_(self.exp_avg.div(denominator).mul_(step_size))
        return self.average


class PackedLoss(nn.Module):
    """The matching loss with the ADAM moving average for any way to compute the moments."""

    def __init__(self, reduction: Reduction, target_mean: Tensor, target_var: Tensor) -> None:
        super().__init__()
        self.reduction = reduction
        self.target_mean, self.target_var = target_mean, target_var
        self.mean_average = PackedAdamMovingAverage(len(target_mean), target_mean.device)
        self.var_average = PackedAdamMovingAverage(len(target_mean), target_mean.device)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        mean, var = self.reduction(features)
        mean_difference, var_difference = self.target_mean - mean, self.target_var - var
        v = self.mean_average(mean_difference.detach())
        u = self.var_average(var_difference.detach())
        return torch.dot(v, mean_difference) + torch.dot(u, var_difference)
