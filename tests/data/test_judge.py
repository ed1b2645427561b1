"""What counts as right: hand-written cases."""

from __future__ import annotations

import pytest

from skipvision.data.judge import Question, is_right

RIGHT = [
    ("what", "kangaroo", "This is a kangaroo."),
    ("what", "kangaroo", "kangaroo"),
    ("what", "kangaroo", "It's a KANGAROO!"),
    ("what", "owl", "a owl"),
    ("what", "fish", "these are fish"),
    ("what", "soccer ball", "A soccer ball."),
    ("what", "red circle", "This is a red circle."),
    ("what", "red circle", "a circle"),
    ("what", '"STOP"', 'This is the word "STOP".'),
    ("what", '"STOP"', "the word stop"),
    ("colour", "gray", "The circle is grey."),
    ("colour", "red", "red"),
    ("count", "3", "There are 3 dogs."),
    ("count", "3", "Three."),
    ("count", "3", "I see 3 dogs in a picture"),
    ("count", "1", "There is a dog."),
    ("count", "0", "There are no dogs."),
    ("count", "0", "none"),
    ("where", "dog|left|star", "The dog is to the left of the star."),
    ("where", "dog|left|star", "left"),
    ("where", "dog|left|star", "The star is to the right of the dog."),
    ("where", "car|right|carrot", "The carrot is to the left of the car."),
    ("where", "cat|above|word", "it is over the word"),
    ("where", "red star|below|blue star", "The red star is below the blue star."),
    ("where", "red star|below|blue star", "The blue star is above the red star."),
    ("presence", "yes", "Yes, there is a dog."),
    ("presence", "no", "no"),
    ("read", "STOP", 'It says "STOP".'),
    ("read", "STOP", "stop"),
    ("read", "STOP", "It says \u2018Stop\u2019."),
    ("read", "42", "the number is 42"),
    ("describe", "1 dog;1 red circle;2 cup", "There is a dog, a red circle and 2 cups."),
    ("describe", "1 dog;1 red circle;2 cup", "two cups, one dog and a red circle"),
    ("describe", "1 dog;1 red circle;2 cup", "There are 2 cups, the red circle, and dog"),
    ("describe", "2 red circle", "a red circle and a red circle"),
    ("describe", '1 "STOP";1 owl', 'There is the word "STOP" and an owl.'),
    ("describe", '1 "42"', "There is the number 42."),
    ("describe", "1 light bulb", "a light bulb"),
    ("easy_vqa", "yes", "Yes."),
    ("easy_vqa", "teal", "It is teal."),
    ("easy_vqa", "circle", "It is a circle."),
]

WRONG = [
    ("what", "kangaroo", ""),
    ("what", "kangaroo", "This is a dog."),
    ("what", "kangaroo", "a kangaroo and a dog"),
    ("what", "kangaroo", "not a kangaroo"),
    ("what", "dog", 'This is the word "DOG".'),
    ("what", "red circle", "a blue circle"),
    ("what", "red circle", "It is red."),
    ("what", '"STOP"', 'the word "SHOP"'),
    ("what", '"STOP"', ""),
    ("colour", "red", "The circle is red or blue."),
    ("colour", "red", "It is not red."),
    ("colour", "red", "a circle"),
    ("count", "3", "There are 2 dogs."),
    ("count", "3", "3 or 4"),
    ("count", "3", "some dogs"),
    ("count", "1", "There are no dogs."),
    ("where", "dog|left|star", "right"),
    ("where", "dog|left|star", "The star is to the left of the dog."),
    ("where", "red star|left|dog", "The dog is to the left of the star."),
    ("where", "dog|left|star", "The cat is to the left of the star."),
    ("where", "dog|left|star", "left or right"),
    ("where", "dog|left|star", "It is not left of it."),
    ("where", "red star|left|dog", "The blue star is to the left of the dog."),
    ("where", "dog|left|star", "there"),
    ("presence", "yes", "No, there is no dog."),
    ("presence", "no", "nothing"),
    ("presence", "yes", "There is a dog."),
    ("read", "STOP", 'It says "STO".'),
    ("read", "STOP", "It says"),
    ("read", "STOP", 'It says "STOPS".'),
    ("describe", "1 dog;2 cup", "There is a dog and a cup."),
    ("describe", "1 dog;2 cup", "There is a dog."),
    ("describe", "1 dog", "There is a dog and a cat."),
    ("describe", "1 dog", "There is a dog and a unicorn."),
    ("describe", "1 dog", "dogs"),
    ("describe", "1 red circle", "There is a circle."),
    ("describe", "1 red circle", "There is a blue circle."),
    ("describe", '1 "STOP"', 'There is the word "SHOP".'),
    ("describe", "1 dog", ""),
    ("easy_vqa", "yes", "No."),
    ("easy_vqa", "red", "It is red or blue."),
]


@pytest.mark.parametrize(("task", "truth", "answer"), RIGHT)
def test_right(task: str, truth: str, answer: str) -> None:
    assert is_right(Question(task, "", "", truth), answer)


@pytest.mark.parametrize(("task", "truth", "answer"), WRONG)
def test_wrong(task: str, truth: str, answer: str) -> None:
    assert not is_right(Question(task, "", "", truth), answer)
