"""What the handlers of prediction make of the settings of a run."""

from semisam_o1.handlers import copy_predictions


def test_copies_of_the_template_are_cleaned_by_channel(tmp_path):
    """Their labels hold channels: class 2 of 0, 2, 5 is channel 1, and class 5 is channel 2."""
    saver = copy_predictions([], tmp_path, 1, class_numbers=[0, 2, 5], largest_component=[2])
    assert saver.largest_component == [1] and saver.numbers is None
    assert copy_predictions([], tmp_path, 1, class_numbers=[0, 2, 5], largest_component=[5]).largest_component == [2]
    assert copy_predictions([], tmp_path, 1).largest_component == ()
