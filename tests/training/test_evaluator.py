"""The shipped classifier and the distance it measures."""

import pytest
import torch

from moment_ops.training import classifiers, data, evaluator, evaluator_weights, judges
from moment_ops.training.networks import Generator


@pytest.fixture(scope="module")
def digits():
    return data.mnist()


@pytest.fixture(scope="module")
def digit_evaluator(digits):
    return evaluator.Evaluator(digits)


def test_the_shipped_classifier_knows_held_out_digits(digits):
    classifier = judges.Digits().classifier
    held_out = classifiers.Task(digits.held_out, digits.held_out_labels)
    assert classifiers.accuracy(classifier, held_out) >= 0.988


def test_the_shipped_weights_are_small():
    assert evaluator_weights.WEIGHTS.stat().st_size < 1_000_000


def test_training_images_have_no_distance_to_themselves(digits, digit_evaluator):
    assert digit_evaluator.distance([data.scale(digits.train)]) == pytest.approx(0, abs=0.01)


def test_held_out_digits_are_much_closer_than_noisy_ones_and_noise(digits, digit_evaluator):
    images = data.scale(digits.held_out)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(images.shape, generator=generator) * 2 - 1
    noisy = digit_evaluator.distance([(images + noise).clamp(-1, 1)])
    assert digit_evaluator.held_out_distance < noisy / 10
    assert noisy < digit_evaluator.distance([noise])


def test_a_lost_class_shows(digits, digit_evaluator):
    nine_classes = digits.held_out[digits.held_out_labels != 3]
    assert digit_evaluator.distance([data.scale(nine_classes)]) > 1.5 * digit_evaluator.held_out_distance


def test_sampling_leaves_the_generator_and_the_global_random_state_as_they_were():
    generator = Generator(latent_size=8)
    state = torch.get_rng_state()
    first = evaluator.sample(generator, 5, seed=0)
    assert generator.training
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[0], evaluator.sample(generator, 5, seed=0)[0])
