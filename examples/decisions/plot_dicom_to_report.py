"""
From a folder of DICOM files to a page
======================================

A folder with a sub-folder for each class is read, patients are known by the names of the files,
methods are compared on the same patients, and a page is written that opens in any browser. It needs
``pip install "sklearn_medimb[files,plot]"``.
"""

# %%
# Files as a scanner writes them: here they are made, 12 bits, in Hounsfield-like units.

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from sklearn_medimb import CSSNClassifier, SoftmaxClassifier
from sklearn_medimb.comparison import compare_methods
from sklearn_medimb.datasets import from_folder, make_lesions
from sklearn_medimb.report import report

place = tempfile.TemporaryDirectory()
folder = Path(place.name)


def write(path, pixels):
    """Write a slice of CT."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    film = FileDataset(path, {}, file_meta=meta, preamble=bytes(128))
    film.SOPClassUID, film.SOPInstanceUID = meta.MediaStorageSOPClassUID, generate_uid()
    film.Modality, film.PhotometricInterpretation = "CT", "MONOCHROME2"
    film.Rows, film.Columns = pixels.shape
    film.SamplesPerPixel, film.BitsAllocated, film.BitsStored, film.HighBit = 1, 16, 12, 11
    film.PixelRepresentation, film.RescaleIntercept, film.RescaleSlope = 0, -1024, 1
    film.PixelData = pixels.astype("<u2").tobytes()
    path.parent.mkdir(exist_ok=True)
    film.save_as(path)


made = make_lesions(
    [120, 2, 2, 40], image_size=24, images_per_patient=2, difficulty=0.0, random_state=0
)
kept = np.isin(made.target, (0, 3))
gray = made.images[kept].mean(axis=3) * 8  # 0 to 2040
kinds = np.array(made.target_names)[made.target[kept]]
for row, (pixels, kind, patient) in enumerate(zip(gray, kinds, made.groups[kept], strict=True)):
    write(folder / kind / f"p{patient:03}_{row}.dcm", pixels)
print("folders:", sorted(path.name for path in folder.iterdir()))

# %%
# One line reads them: the class is the folder, the patient what the expression finds.

data = from_folder(folder, groups=r"^(p\d+)_", image_size=24)
print(len(data.labels), "images of", len(np.unique(data.groups)), "patients")

# %%
# Every image is tested once, by a network that has not seen its patient.

methods = {
    "class weights": SoftmaxClassifier(class_weight="balanced", max_epochs=30),
    "CSSN": CSSNClassifier(max_epochs=30),
}
found = compare_methods(methods, data.images, data.labels, groups=data.groups, cv=2)
print(found)

# %%
# The table as a figure: intervals by patients.

found.plot()
plt.show()

# %%
# And the page, with an operating point, errors, and what CSSN looked at.

page = report(
    found, data.images, data.labels, groups=data.groups, method="CSSN", min_sensitivity=0.6
)
path = page.save(folder / "report.html")
print(f"{Path(path).name}: {Path(path).stat().st_size / 1e6:.1f} MB, no script, no network")
place.cleanup()
