"""Plain pictures for environments without a 3-D scene: charts as arrays, and a window that shows them."""

import contextlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from envs import UserError

Curve = tuple[str, tuple[int, int, int], np.ndarray]  # label, colour, values at the steps 0, 1, ...
INK, GRID, PAPER = (60, 60, 60), (225, 225, 225), (255, 255, 255)


def charts(panels: Sequence[tuple[str, list[Curve]]], steps: int, width: int = 720, height: int = 480) -> np.ndarray:
    """Panels of curves over the same steps, one below the other.

    Args:
        panels: (title, curves) each; a curve may end before the last step.
        steps: length of the horizontal axis.

    Returns:
        uint8 (height, width, 3).
    """
    image = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(image)
    left, right, gap = 52, width - 12, 26
    each = height // len(panels)
    for k, (title, curves) in enumerate(panels):
        top, bottom = k * each + gap, (k + 1) * each - 8
        values = np.concatenate([np.asarray(curve, float) for _, _, curve in curves])
        low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
        margin = 0.08 * (high - low) + 1e-3
        low, high = low - margin, high + margin
        for mark in np.linspace(low, high, 3):
            y = bottom - (mark - low) / (high - low) * (bottom - top)
            pen.line([left, y, right, y], GRID)
            pen.text((4, y - 6), f"{mark:+.2f}", INK)
        pen.rectangle([left, top, right, bottom], outline=INK)
        pen.text((left, top - 16), title, INK)
        x = right
        for label, colour, curve in reversed(curves):
            x -= 14 + int(pen.textlength(label))
            pen.text((x, top - 16), label, colour)
            points = [
                (left + t / max(steps - 1, 1) * (right - left), bottom - (y - low) / (high - low) * (bottom - top))
                for t, y in enumerate(curve)
            ]
            if len(points) > 1:
                pen.line(points, colour, width=2)
    return np.asarray(image)


class Window:
    """A window that shows one picture after the other; closing it ends the program with an error."""

    def __init__(self, title: str):
        try:
            import tkinter

            self.root, self.TclError = tkinter.Tk(), tkinter.TclError
        except Exception as error:  # no tkinter, or its TclError where there is no display
            raise UserError(f"no window can be opened here ({error}); --capture-video records one instead") from error
        self.root.title(title)
        self.label = tkinter.Label(self.root)
        self.label.pack()

    def show(self, frame: np.ndarray) -> None:
        """frame: uint8 (height, width, 3)."""
        from PIL import ImageTk

        try:
            # Tk keeps no reference of its own
            self.image = ImageTk.PhotoImage(Image.fromarray(frame), master=self.root)
            self.label.configure(image=self.image)
            self.root.update()
        except (self.TclError, RuntimeError) as error:
            raise UserError("the window was closed; without --render human none is needed") from error

    def close(self) -> None:
        with contextlib.suppress(self.TclError):  # it may be closed already
            self.root.destroy()
