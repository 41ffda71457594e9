"""What all pictures share: matplotlib, colours, pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from typing import Self

# Okabe and Ito's colours, which colour-blind readers tell apart; yellow, on white, comes last.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#F0E442")
MARKERS = "osD^vPX*"
MOST_NAMED = 8  # classes that a legend tells apart
_LONGEST = 32  # letters of a label in a picture


def pyplot(display: Any) -> Any:
    """Module matplotlib.pyplot.

    Raises
    ------
    ImportError
        If there is none.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        name = type(display).__name__
        raise ImportError(
            f'{name} needs matplotlib: pip install "sklearn_medimb[plot]".'
        ) from error
    return plt


def new_axes(display: Any, ax: Any, size: tuple[float, float]) -> Any:
    """Axes of the caller, or new ones."""
    if ax is not None:
        return ax
    return pyplot(display).subplots(figsize=size, layout="constrained")[1]


class Display:
    """A picture in one pair of axes."""

    ax_: Any
    figure_: Any
    _size: Any = (6.4, 4.2)  # inches

    def plot(self, ax: Any = None) -> Self:
        """Draw.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        display : object
            This one.
        """
        ax = new_axes(self, ax, self._size)
        self._draw(ax)
        self.ax_, self.figure_ = ax, ax.figure
        return self

    def _draw(self, ax: Any) -> None:
        raise NotImplementedError


def grid_of_axes(display: Any, axes: Any, shape: tuple[int, int], side: float = 2.1) -> np.ndarray:
    """Axes of the caller in rows and columns, or new ones.

    Raises
    ------
    ValueError
        If those of the caller have another shape.
    """
    if axes is None:
        n_rows, n_columns = shape
        size = (side * n_columns + 0.4, (side + 0.5) * n_rows + 0.4)
        _, axes = pyplot(display).subplots(
            n_rows, n_columns, figsize=size, squeeze=False, layout="constrained"
        )
    axes = np.asarray(axes, dtype=object)
    if 1 in shape and axes.shape == (max(shape),):  # as pyplot.subplots gives a row or a column
        axes = axes.reshape(shape)
    if axes.shape != shape:
        raise ValueError(f"axes has shape {axes.shape}; it must be {shape}.")
    return axes


def style(index: int) -> dict[str, str]:
    """Colour and marker of a class: both, for readers who see no colours."""
    n = len(COLOURS)
    marker = MARKERS[(index + index // n) % len(MARKERS)]
    return {"color": COLOURS[index % n], "marker": marker}


def pictures(images: torch.Tensor) -> np.ndarray:
    """Turn ``(n, C, *spatial)`` into what imshow takes: the middle slice, gray or RGB."""
    if images.ndim == 5:
        images = images[:, :, images.shape[2] // 2]
    if images.shape[1] in (3, 4):
        return images[:, :3].movedim(1, -1).clamp(0, 1).numpy()
    return images.mean(dim=1).numpy()


def pictures_of(estimator: Any, X: Any, rows: Any = None) -> np.ndarray:
    """Images as an image estimator reads them, as pictures with values in [0, 1].

    Those of a paired estimator show the image, not its reference.
    """
    images = estimator._read(X)
    wanted = np.arange(len(images)) if rows is None else np.asarray(rows)
    pixels = images.rows(wanted)
    if pixels.ndim < 4:
        raise ValueError("X holds feature vectors: there is no picture of them.")
    if images.layout.paired:
        pixels = pixels[:, : pixels.shape[1] // 2]
    if pixels.dtype == torch.uint8:
        return pictures(pixels.float() / 255)
    pixels = pixels.float()
    low, high = pixels.min(), pixels.max()
    return pictures((pixels - low) / (high - low).clamp_min(1e-12))


def show(ax: Any, picture: np.ndarray) -> None:
    """One picture without ticks."""
    ax.imshow(picture, cmap="gray", vmin=0, vmax=1)
    ax.set_xticks([])
    ax.set_yticks([])


def percent(share: float) -> str:
    """A probability as people read it; never 0 or 100 % of what is less sure."""
    if 0 < share < 0.01:
        return "< 1 %"
    if 0.99 < share < 1:
        return "> 99 %"
    return f"{100 * share:.0f} %"


def verdict(predicted: Any, true: Any) -> str:
    """Whether a prediction is right, or what would have been."""
    return "right" if predicted == true else f"wrong: is {written(true)}"


def written(label: Any) -> str:
    """A label, or a name, on a line of a picture: not too long, and with no meaning to Matplotlib.

    Dollars would make a formula of it, and an underscore at its start keep it out of a legend.
    """
    text = " ".join(str(label).split())
    text = f"\N{ZERO WIDTH SPACE}{text}" if text.startswith("_") else text
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST * 2 // 3]}…{text[-_LONGEST // 3 :]}"
    return text.replace("$", r"\$")


def legend(ax: Any, n: int, **how: Any) -> None:
    """Legend of `n` entries, beside the axes where there are many."""
    if n > MOST_NAMED:
        how |= {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "ncols": -(-n // 20)}
    ax.legend(fontsize=8, frameon=False, **how)
