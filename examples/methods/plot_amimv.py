"""
AMIMV: no image is seen alone
=============================

AMIMV learns without labels. Every image is laid over a partner, and two branches see the two in
different views; their sums are pulled together. A rare image then enters about twice as many pairs,
each time over a mostly frequent one.
"""

# %%
# Two images, and the views of the two branches: clean for the one, augmented for the other.

import matplotlib.pyplot as plt
import torch

from sklearn_medimb import AMIMVEncoder
from sklearn_medimb.augment import resolve_augmentation
from sklearn_medimb.datasets import make_lesions

data = make_lesions((200, 60, 20, 8), image_size=48, difficulty=0.2, random_state=0)
pictures = torch.from_numpy(data.images[[0, -1]]).permute(0, 3, 1, 2) / 255
generator = torch.Generator().manual_seed(3)
hard = resolve_augmentation("contrastive")
views = []
for blur in (1.0, 0.1):  # a1 and a2 are unlike: one is always blurred, the other rarely
    hard.set_params(blur_probability=blur)
    views.append(hard.apply(pictures, hard.draw(2, tuple(pictures.shape[1:]), generator)))

x, y = pictures
rows = {
    "online": [("x", x), ("+", None), ("a1(y)", views[0][1])],
    "target": [("a2(x)", views[1][0]), ("+", None), ("y", y)],
}
figure, axes = plt.subplots(
    2, 4, figsize=(8, 4), layout="constrained", gridspec_kw={"width_ratios": [3, 0.6, 3, 3]}
)
for line, (name, parts) in zip(axes, rows.items(), strict=True):
    for ax, (title, picture) in zip(line, parts, strict=False):
        ax.set(xticks=[], yticks=[])
        ax.set_frame_on(picture is not None)
        if picture is None:
            ax.text(0.5, 0.5, "+", ha="center", va="center", fontsize=24)
            continue
        ax.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy())
        ax.set_title(title)
    line[0].set_ylabel(name)
    line[3].set_axis_off()
    branch = "q" if name == "online" else "k"
    one, other = parts[0][0], parts[2][0]
    line[3].text(0, 0.5, f"z = {branch}({one}) + {branch}({other})", va="center", fontsize=13)
plt.show()

# %%
# An encoder that is trained so is a transformer, and the start of any classifier. ``y`` is for a
# probe alone.

encoder = AMIMVEncoder(max_epochs=8, image_size=16, random_state=0)
encoder.fit(data.images, data.target)
print("features:", encoder.transform(data.images).shape)
