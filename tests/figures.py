"""What makes a figure fit to show: ink in every axes, no text cut off, no labels on each other."""

import itertools

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

DPI = 50


def pixels(figure: Figure) -> np.ndarray:
    """The figure drawn, [row, column, colour], row 0 on top."""
    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def assert_fit_to_show(figure: Figure, ink: float = 0.02) -> None:
    """**Arguments:** `ink`: which share of every axes must not be white."""
    image = pixels(figure)
    height, width = image.shape[:2]
    drawn = (image != 255).any(axis=-1)
    for axes in visible_axes(figure):
        box = axes.get_window_extent()
        inside = drawn[height - int(box.y1) : height - int(box.y0), int(box.x0) : int(box.x1)]
        assert inside.size, f"{axes.get_title()!r} has no room"
        # Inside the frame, which would be ink even of an empty panel; a colour bar may be thin.
        margins = tuple(slice(2, -2) if size > 8 else slice(None) for size in inside.shape)
        core = inside[margins]
        assert core.mean() > ink, f"{axes.get_title()!r} is blank: {core.mean():.3f} inked"
    for text in shown_texts(figure):
        box = text.get_window_extent()
        whole = -1 <= box.x0 and box.x1 <= width + 1 and -1 <= box.y0 and box.y1 <= height + 1
        assert whole, f"{text.get_text()!r} is cut off: {box} in {width} x {height}"
    for axes in visible_axes(figure):
        for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
            assert_apart([t for t in labels if is_shown(t)])
    titles = [t for a in visible_axes(figure) for t in (a.title, a.xaxis.label, a.yaxis.label)]
    whole = [figure._suptitle, figure._supxlabel, figure._supylabel]  # pyright: ignore
    assert_disjoint([t for t in [*titles, *whole] if t is not None and is_shown(t)])


def visible_axes(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.get_visible()]


def shown_texts(figure: Figure) -> list[Text]:
    """Every text that is drawn, tick labels outside an axis's limits left out."""
    hidden = {
        id(text)
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        for text in (tick.label1, tick.label2)
        if not axes.get_visible() or tick not in axis._update_ticks()  # pyright: ignore
    }
    return [t for t in figure.findobj(Text) if id(t) not in hidden and is_shown(t)]


def is_shown(text: Text) -> bool:
    return text.get_visible() and bool(text.get_text().strip()) and bool(text.get_alpha() != 0)


def assert_apart(labels: list[Text]) -> None:
    """Tick labels of one axis do not touch; slanted ones are as far apart as they are high."""
    for a, b in itertools.pairwise(labels):
        angle = np.deg2rad(a.get_rotation())
        (x0, y0), (x1, y1) = (t.get_transform().transform(t.get_position()) for t in (a, b))
        if 0 < angle < np.pi / 2:
            heights = []
            for t in (a, b):
                t.set_rotation(0)
                heights.append(t.get_window_extent().height)
                t.set_rotation(np.rad2deg(angle))
            distance = abs((x1 - x0) * np.sin(angle) - (y1 - y0) * np.cos(angle))
            assert distance >= 0.9 * max(heights), f"{a.get_text()!r} and {b.get_text()!r} overlap"
        else:
            assert_disjoint([a, b])


def assert_disjoint(texts: list[Text]) -> None:
    """No two texts lie on each other by more than a pixel."""
    boxes = [t.get_window_extent() for t in texts]
    for (a, box), (b, other) in itertools.combinations(zip(texts, boxes, strict=True), 2):
        wide = min(box.x1, other.x1) - max(box.x0, other.x0)
        high = min(box.y1, other.y1) - max(box.y0, other.y0)
        assert min(wide, high) <= 1, f"{a.get_text()!r} and {b.get_text()!r} overlap"
