"""Trains the evaluation classifier and writes its weights: ``python -m moment_ops.training.make_evaluator``."""

import argparse

import torch

from moment_ops.training import classifiers, data, evaluator
from moment_ops.training.devices import choose_device
from moment_ops.training.networks import EvaluationClassifier


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train the classifier that evaluates samples, which takes a few minutes, and write its weights."
    )
    parser.add_argument("--iterations", type=int, default=2600, help="training steps (default: 2600)")
    arguments = parser.parse_args()

    digits = data.mnist().to(choose_device())
    assert digits.train_labels is not None
    assert digits.held_out_labels is not None
    torch.manual_seed(0)
    classifier = EvaluationClassifier().to(digits.train.device)
    classifiers.train_classifier(
        classifier, digits.train, digits.train_labels, iterations=arguments.iterations, strength=1.0
    )
    evaluator.save_classifier(classifier)
    share = classifiers.accuracy(evaluator.load_classifier(), digits.held_out.cpu(), digits.held_out_labels.cpu())
    print(f"{evaluator.WEIGHTS}: {share:.1%} of the held-out digits are classified correctly")


if __name__ == "__main__":
    main()
