"""Settings of the smallest training."""

TINY = {
    "steps": 20,
    "seconds": float("inf"),
    "batch_size": 4,
    "latent_size": 8,
    "log_every": 1,
    "evaluate_every": 10,
    "checkpoint_every": 10,
    "extractor_iterations": 2,
    "judge": "digits",
}
