"""What the site shows that lies beside `docs/`: the README as its first page, the changes, and files that pages name.

mkdocs calls these functions; their names are its own.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent

BESIDE = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "CITATION.cff")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies beside the folder of pages."""
    examples = (str(path.relative_to(ROOT)) for path in sorted((ROOT / "examples").iterdir()) if path.is_file())
    for name in (*BESIDE, *examples):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they are in the repository, as they are in the site; and fences without what is said to the tests."""
    markdown = re.sub(r"^(```\w+) [\w-]+$", r"\1", markdown, flags=re.MULTILINE)  # the site takes one word
    if page.file.src_uri in BESIDE:
        markdown = markdown.replace("](docs/index.md)", "](README.md)")
        return re.sub(r"\]\(docs/", "](", markdown)
    return re.sub(r"\]\(\.\./(?=examples/|[A-Z])", "](", markdown)
