"""What the design wants of a GPU. Times are of an H200; of another card, shares of its copy bandwidth count."""

from dataclasses import dataclass

from bench.results import NO_LOSS

# Of the measured copy bandwidth, for what only moves bytes.
SHARE = 0.9


@dataclass(frozen=True)
class Goal:
    """What is wanted of one measurement."""

    microseconds: float | None = None
    share: float | None = None
    # Least factor over a rival, by the beginning of its name.
    factors: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        parts = [f"<= {self.microseconds:g} us (H200)"] if self.microseconds else []
        parts += [f">= {100 * self.share:.0f} % of copy"] if self.share else []
        parts += [f">= {factor:g}x {rival}" for rival, factor in self.factors]
        return ", ".join(parts)


# By kernel, workload and dtype.
KERNELS = {
    ("match, forward", "gfmn", "float32"): Goal(69, SHARE),
    ("match, forward", "gfmn", "bfloat16"): Goal(41, SHARE),
    ("moments, backward", "gfmn", "float32"): Goal(113, SHARE),
    ("moments, backward", "gfmn", "bfloat16"): Goal(57, SHARE),
    ("moments, forward", "gfmn", "float32"): Goal(share=SHARE),
    ("moments, forward", "gfmn", "bfloat16"): Goal(share=SHARE),
    ("relu_moments, forward", "vgg19", "float32"): Goal(share=SHARE),
    ("relu_moments, forward", "vgg19", "bfloat16"): Goal(share=SHARE),
    ("relu_moments, backward", "vgg19", "float32"): Goal(share=SHARE),
    ("relu_moments, backward", "vgg19", "bfloat16"): Goal(share=SHARE),
    ("covariance loss, forward", "d2048", "bfloat16"): Goal(12),
    ("covariance loss, forward, bf16x3", "d2048", "float32"): Goal(26),
    ("covariance loss, forward", "d8192", "bfloat16"): Goal(factors=(("torch.mm", 1.85),)),
    ("covariance loss, forward, bf16x3", "d8192", "float32"): Goal(factors=(("torch.mm", 1.85),)),
    ("gram, forward + backward", "vgg19", "float32"): Goal(110),
    ("gram, forward + backward", "vgg19", "bfloat16"): Goal(60),
}

# By operator and workload, forward and backward together.
COMPARISONS = {
    ("match", "gfmn"): Goal(factors=(("eager", 10), ("torch.compile", 2))),
    ("relu_moments", "vgg19"): Goal(factors=((NO_LOSS, 1.0),)),
    ("relu_moments", "gfmn"): Goal(factors=((NO_LOSS, 1.0),)),
}
