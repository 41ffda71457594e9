"""Where the page about a class is.

Imports nothing of the package.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, metadata


@cache
def site() -> str:
    """Address of the published site: the documentation URL of the installed package, if any."""
    try:
        urls = metadata("sklearn_medimb").get_all("Project-URL") or []
    except PackageNotFoundError:
        return ""
    found = [url.partition(", ")[2] for url in urls if url.startswith("Documentation, ")]
    return found[0].rstrip("/") if found else ""


class Documented:
    """Base of estimators: in notebooks their pictures link to their page, of their version.

    They do where the site is published, of which ``[project.urls]`` then tells the address.

    A page has the shortest name that one imports, ``sklearn_medimb.CSSNClassifier`` or, of what the
    package itself does not list, ``sklearn_medimb.decisions.OperatingPoint``. Classes from outside
    have none.
    """

    _doc_link_module = "sklearn_medimb"

    @property
    def _doc_link_template(self) -> str:
        return f"{site()}/{{version}}/api/{{page}}.html" if site() else ""

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
