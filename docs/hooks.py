"""What the pages link to outside of docs/ (results, recipes) comes along into the site."""

from pathlib import Path

from mkdocs.structure.files import File

SHOWN = ("results", "configs", "CONTRIBUTING.md")
ROOT = Path(__file__).parent.parent


def on_files(files, config):
    """Adds the files that the pages link to."""
    for name in SHOWN:
        place = ROOT / name
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.is_file():
                name = path.relative_to(ROOT).as_posix()
                name = name.replace(".md", ".txt")  # as it is, not as a page of the site
                files.append(File.generated(config, f"files/{name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Points their links to where they lie in the site."""
    up = "../" * (page.file.src_uri.count("/") + 1)
    here = "../" * page.file.src_uri.count("/")
    for name in SHOWN:
        markdown = markdown.replace(f"]({up}{name}", f"]({here}files/{name.replace('.md', '.txt')}")
    return markdown
