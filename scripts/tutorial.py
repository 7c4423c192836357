"""The notebooks as pages of the site, with what they print and show.

`python -m scripts.tutorial [names]` runs those that changed, or whose package did, into build/tutorial; `make docs`
does it first. As a hook of mkdocs it makes a page of each; where a notebook was not run, a page without outputs.
"""

import hashlib
import html
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS, RAN = ROOT / "notebooks", ROOT / "build" / "tutorial"
WIDGET = "application/vnd.jupyter.widget-view+json"
SHOWN = ("text/html", "image/svg+xml", "image/png", "text/plain")  # the first that an output has


# running


def main(names: Sequence[str]) -> None:
    """Run what has to be run, one after the other, in a home of its own."""
    RAN.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tensafe-home-") as home:
        os.environ |= {"TENSAFE_HOME": home, "TENSAFE_NB_RENDERER": "widget"}
        for path in notebooks():
            if not runs_here(path) or (path.stem not in names if names else up_to_date(path)):
                continue
            started = time.perf_counter()
            run(path)
            print(f"{path.stem}: {time.perf_counter() - started:.0f} s", flush=True)


def run(path: Path) -> None:
    """Execute a notebook where it lies; keep the outcome with what it was made of, and a replay of each panel in it."""
    import nbformat
    from nbclient import NotebookClient

    import tensafe_nb as tn

    notebook = nbformat.read(path, as_version=4)
    quiet = ["--log-level=ERROR"]
    NotebookClient(notebook, timeout=600, kernel_name="python3", extra_arguments=quiet).execute(
        cwd=str(path.parent)
    )
    for old in RAN.glob(f"{path.stem}-*.html"):
        old.unlink()
    for run_id in filter(
        None, (panel_of(output) for cell in notebook.cells for output in cell.get("outputs", ()))
    ):
        tn.save_page(replay_of(path.stem, run_id), run_id, title=title(path), samples=3)
    notebook.metadata["made_of"] = made_of(path)
    nbformat.write(notebook, RAN / path.name)


def panel_of(output: Any) -> str | None:
    """Return the id of the run whose panel an output is."""
    if WIDGET not in output.get("data", {}):
        return None
    said = re.match(r"Live panel of run (\d+) of (\S+):", "".join(output["data"].get("text/plain", "")))
    return f"{said[2]}/{said[1]}" if said else None


def replay_of(stem: str, run_id: str) -> Path:
    return RAN / f"{stem}-{run_id.replace('/', '-')}.html"


def runs_here(path: Path) -> bool:
    """Whether what a notebook needs is installed: the last one's SDK is no part of this environment."""
    return path.stem != "13_tinker_sdk" or find_spec("tinker") is not None


def notebooks() -> list[Path]:
    return sorted(NOTEBOOKS.glob("*.ipynb"))


def made_of(path: Path) -> str:
    """Return a digest of a notebook and of the package that it runs."""
    package = (file for file in (ROOT / "tensafe_nb").rglob("*") if file.suffix in {".py", ".js", ".css"})
    digest = hashlib.sha256(path.read_bytes())
    for file in sorted(package):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def up_to_date(path: Path) -> bool:
    ran = RAN / path.name
    return ran.exists() and json.loads(ran.read_text(encoding="utf-8"))["metadata"].get("made_of") == made_of(
        path
    )


# the pages


def on_config(config: Any) -> Any:
    """Put the notebooks below the tutorial's first page."""
    pages = [{title(path): f"tutorial/{path.stem}.md"} for path in notebooks()]
    pages.append({"Glossary": "tutorial/glossary.md"})
    config.nav = [
        {"Tutorial": [entry["Tutorial"], *pages]} if "Tutorial" in entry else entry for entry in config.nav
    ]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add a page for each notebook, and one for the glossary that they link."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "tutorial/glossary.md", abs_src_path=str(NOTEBOOKS / "glossary.md")))
    for path in notebooks():
        files.append(File.generated(config, f"tutorial/{path.stem}.md", content=page_of(path)))
        for replay in RAN.glob(f"{path.stem}-*.html"):
            files.append(File.generated(config, f"tutorial/{replay.name}", abs_src_path=str(replay)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links to notebooks and glossary, which are right in the repository, lead to their pages."""
    up = "../" * page.file.src_uri.count("/")
    return re.sub(r"\]\((?:\.\./)*notebooks/(\w+)\.(?:ipynb|md)\)", rf"]({up}tutorial/\1.md)", markdown)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Put a cell's outputs, which are HTML already, where its Markdown kept a place for them."""
    path = RAN / f"{Path(page.file.src_uri).stem}.ipynb"
    if not in_tutorial(page) or not path.exists():
        return content
    outputs = {
        f"{number}": shown(cell, path.stem)
        for number, cell in enumerate(cells(path))
        if cell["cell_type"] == "code"
    }
    return re.sub(r'<div class="nb-out" data-cell="(\d+)"></div>', lambda place: outputs[place[1]], content)


def in_tutorial(page: Any) -> bool:
    return bool(page.file.src_uri.startswith("tutorial/"))


def title(path: Path) -> str:
    """Return a notebook's first heading up to its colon: `1 · Quickstart`."""
    return "".join(cells(path)[0]["source"]).splitlines()[0].lstrip("# ").partition(":")[0]


def cells(path: Path) -> list[dict[str, Any]]:
    return list(json.loads(path.read_text(encoding="utf-8"))["cells"])


def page_of(path: Path) -> str:
    """Return a notebook as Markdown, with a place for the outputs of each cell that has some."""
    ran = RAN / path.name
    return "\n\n".join(parts(path, cells(ran if ran.exists() else path), ran=ran.exists()))


def parts(path: Path, of: list[dict[str, Any]], *, ran: bool) -> Iterator[str]:
    without = "" if ran else " Here without what it prints: `make docs` runs it first."
    for number, cell in enumerate(of):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            yield re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", source).replace("](../docs/", "](../")
        else:
            yield f"```python\n{source}\n```"
            if shown(cell, path.stem):
                yield f'<div class="nb-out" data-cell="{number}"></div>'
        if number == 0:
            yield f"*This is `notebooks/{path.name}`; `make lab` opens it.{without}*"


def shown(cell: dict[str, Any], stem: str) -> str:
    """Return a code cell's outputs as HTML, a panel as what plays it again; "" where nothing is to be seen."""
    inner = "\n".join(
        filter(None, (played(output, stem) or as_html(output) for output in joined(cell["outputs"])))
    )
    return f'<div class="nb-out">\n{inner}\n</div>' if inner else ""


def played(output: dict[str, Any], stem: str) -> str:
    """Return a panel as a replay to be opened; "" for what is no panel, or has none."""
    replay = replay_of(stem, panel_of(output) or "")
    if not replay.is_file():
        return ""
    frame = f'<iframe src="{replay.name}" title="The panel, as it went" loading="lazy"></iframe>'
    return f"<details><summary>The panel: play it as it went</summary>{frame}</details>"


def joined(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the outputs with what was printed in one go in one piece, however it came."""
    found: list[dict[str, Any]] = []
    for output in outputs:
        if found and output["output_type"] == "stream" and output.get("name") == found[-1].get("name"):
            found[-1] = found[-1] | {"text": [*found[-1]["text"], *output["text"]]}
        else:
            found.append(output)
    return found


def as_html(output: dict[str, Any]) -> str:
    if output["output_type"] == "stream":
        return f'<pre class="{output["name"]}">{html.escape("".join(output["text"]).rstrip())}</pre>'
    data = {kind: "".join(value) for kind, value in output["data"].items() if kind in SHOWN}
    kind = next(kind for kind in SHOWN if kind in data)
    if kind == "image/png":
        return f'<img alt="{html.escape(data.get("text/plain", ""))}" src="data:image/png;base64,{data[kind].strip()}">'
    if kind == "text/plain":
        return f"<pre>{html.escape(data[kind])}</pre>" if data[kind] else ""
    return (
        data[kind] if re.search(r">[^<\s]|<img|<svg", data[kind]) else ""
    )  # an empty place of what is told elsewhere


if __name__ == "__main__":
    main(sys.argv[1:])
