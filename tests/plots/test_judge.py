"""The judge of figures finds what is wrong with one."""

import pytest
from figures import assert_fit_to_show
from matplotlib.figure import Figure


def figure(width: float = 4.0, **changes) -> Figure:
    made = Figure(figsize=(width, 3), layout="constrained")
    axes = made.add_subplot()
    axes.bar(range(6), range(1, 7))
    axes.set(xlabel="x", ylabel="y", title="bars", **changes)
    return made


def test_a_good_figure_passes():
    assert_fit_to_show(figure())


def test_a_blank_panel_is_found():
    blank = Figure(figsize=(4, 3), layout="constrained")
    for axes in blank.subplots(1, 2):
        axes.set_title("panel")
    blank.axes[0].imshow([[1, 2]])
    with pytest.raises(AssertionError, match="blank"):
        assert_fit_to_show(blank)


def test_a_clipped_text_is_found():
    clipped = figure()
    clipped.text(0.9, 0.5, "this goes beyond the edge", size=20)
    with pytest.raises(AssertionError, match="cut off"):
        assert_fit_to_show(clipped)


@pytest.mark.parametrize("rotation", [0, 60, 90])
def test_labels_on_each_other_are_found(rotation):
    crowded = figure(width=2.0)
    crowded.axes[0].set_xticks(range(6), ["long labels"] * 6, rotation=rotation, fontsize=24)
    with pytest.raises(AssertionError, match="overlap"):
        assert_fit_to_show(crowded)


def test_a_title_on_another_is_found():
    doubled = figure()
    doubled.axes[0].yaxis.label.set_position((0, 0))
    doubled.axes[0].title.set_position((0.5, 1.0))
    doubled.suptitle("bars again", y=0.94).set_in_layout(False)
    with pytest.raises(AssertionError, match="overlap"):
        assert_fit_to_show(doubled)
