"""Metadata of the package that depends on where the repository is: links.

A release is built where GITHUB_SERVER_URL and GITHUB_REPOSITORY name the repository
(GitHub sets both). The package's page then links to it, and so do the links and the
pictures of the README, which are relative to the repository. Elsewhere they stay so.
"""

import os
import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface


class Links(MetadataHookInterface):
    def update(self, metadata: dict) -> None:
        readme = Path(self.root, "README.md").read_text(encoding="utf-8")
        if os.environ.get("GITHUB_REPOSITORY"):
            server = os.environ.get("GITHUB_SERVER_URL", "https://github.com")
            home = f"{server}/{os.environ['GITHUB_REPOSITORY']}"
            readme = absolute_links(readme, home, f"v{metadata['version']}")
            metadata["urls"] = {
                "Source": home,
                "Changelog": f"{home}/blob/main/CHANGELOG.md",
                "Issues": f"{home}/issues",
            }
        else:
            metadata["urls"] = {}
        metadata["readme"] = {"content-type": "text/markdown", "text": readme}


def absolute_links(text: str, home: str, tag: str) -> str:
    """Markdown whose relative links and pictures lead to the repository at a tag."""

    def lead(match: re.Match) -> str:
        picture, label, target = match.groups()
        kind = "raw" if picture else "blob"
        return f"{picture}[{label}]({home}/{kind}/{tag}/{target})"

    return re.sub(r"(!?)\[([^]]*)\]\((?!\w+:|#)([^)]+)\)", lead, text)
