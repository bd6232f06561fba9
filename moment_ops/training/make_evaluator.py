"""Trains the evaluation classifier and writes its weights: ``python -m moment_ops.training.make_evaluator``."""

import argparse

import torch

from moment_ops.training import classifiers, data, evaluator_weights, judges
from moment_ops.training.devices import choose_device
from moment_ops.training.networks import EvaluationClassifier


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train the classifier that evaluates samples, which takes a few minutes, and write its weights."
    )
    parser.add_argument("--iterations", type=int, default=2600, help="training steps (default: 2600)")
    arguments = parser.parse_args()

    digits = data.mnist().to(choose_device())
    train = classifiers.Task(digits.train, digits.train_labels)
    held_out = classifiers.Task(digits.held_out, digits.held_out_labels, torch.device("cpu"))
    torch.manual_seed(0)
    classifier = EvaluationClassifier().to(digits.train.device)
    classifiers.train_classifier(classifier, train, iterations=arguments.iterations, strength=1.0)
    evaluator_weights.save(classifier)
    share = classifiers.accuracy(judges.Digits().classifier, held_out)
    print(f"{evaluator_weights.WEIGHTS}: {share:.1%} of the held-out digits are classified correctly")


if __name__ == "__main__":
    main()
