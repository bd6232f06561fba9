"""Performance targets. Times are for an H200; on another GPU, shares of its copy bandwidth count."""

from dataclasses import dataclass

from bench.results import NO_LOSS

# The share of the measured copy bandwidth, for kernels that only move bytes.
SHARE = 0.9


@dataclass(frozen=True)
class Target:
    """The target of one measurement."""

    microseconds: float | None = None
    share: float | None = None
    # The smallest factor over a rival, by the beginning of its name.
    factors: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        parts = [f"<= {self.microseconds:g} us (H200)"] if self.microseconds else []
        parts += [f">= {100 * self.share:.0f} % of copy"] if self.share else []
        parts += [f">= {factor:g}x {rival}" for rival, factor in self.factors]
        return ", ".join(parts)


# By kernel, workload and dtype.
KERNELS = {
    ("match, forward", "gfmn", "float32"): Target(69, SHARE),
    ("match, forward", "gfmn", "bfloat16"): Target(41, SHARE),
    ("moments, backward", "gfmn", "float32"): Target(113, SHARE),
    ("moments, backward", "gfmn", "bfloat16"): Target(57, SHARE),
    ("moments, forward", "gfmn", "float32"): Target(share=SHARE),
    ("moments, forward", "gfmn", "bfloat16"): Target(share=SHARE),
    ("relu_moments, forward", "vgg19", "float32"): Target(share=SHARE),
    ("relu_moments, forward", "vgg19", "bfloat16"): Target(share=SHARE),
    ("relu_moments, backward", "vgg19", "float32"): Target(share=SHARE),
    ("relu_moments, backward", "vgg19", "bfloat16"): Target(share=SHARE),
    ("covariance loss, forward", "d2048", "bfloat16"): Target(12),
    ("covariance loss, forward, bf16x3", "d2048", "float32"): Target(26),
    ("covariance loss, forward", "d8192", "bfloat16"): Target(factors=(("torch.mm", 1.85),)),
    ("covariance loss, forward, bf16x3", "d8192", "float32"): Target(factors=(("torch.mm", 1.85),)),
    ("gram, forward + backward", "vgg19", "float32"): Target(110),
    ("gram, forward + backward", "vgg19", "bfloat16"): Target(60),
}

# By operator and workload, forward and backward together.
COMPARISONS = {
    ("match", "gfmn"): Target(factors=(("eager", 10), ("torch.compile", 2))),
    ("relu_moments", "vgg19"): Target(factors=((NO_LOSS, 1.0),)),
    ("relu_moments", "gfmn"): Target(factors=((NO_LOSS, 1.0),)),
}
