"""Where the page about a class is.

Imports nothing of the package.
"""

from __future__ import annotations

import sys


class Documented:
    """Base of estimators: in notebooks their pictures link to their page, of their version.

    A page has the shortest name that one imports, ``sklearn_medimb.CSSNClassifier`` or, of what the
    package itself does not list, ``sklearn_medimb.decisions.OperatingPoint``. Classes from outside
    have none.
    """

    _doc_link_module = "sklearn_medimb"
    _doc_link_template = "https://sklearn-medimb.readthedocs.io/en/{version}/api/{page}.html"

    def _doc_link_url_param_generator(self) -> dict[str, str]:
        name = type(self).__name__
        rooms = [type(self).__module__]
        for room, module in list(sys.modules.items()):
            if room.split(".")[0] == "sklearn_medimb" and name in getattr(module, "__all__", ()):
                rooms.append(room)
        release = sys.modules["sklearn_medimb"].__version__
        return {
            "version": "latest" if "dev" in release else f"v{release}",
            "page": f"{min(rooms, key=len)}.{name}",
        }
