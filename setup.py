"""What pyproject.toml cannot say: the notebooks, which live at the top of the repository, go into the wheel."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

NOTEBOOKS = Path(__file__).parent / "notebooks"


class BuildWithNotebooks(build_py):
    """Copies `notebooks/` to where an installed package looks for it; an editable one reads it in the clone."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source, target in self.copies().items():
                self.mkpath(str(Path(target).parent))
                self.copy_file(source, target)

    def copies(self) -> dict[str, str]:
        target = Path(self.build_lib) / "tensafe_nb" / "notebooks"
        files = [
            path for kind in ("*.ipynb", "*.md", "solutions/*.py") for path in sorted(NOTEBOOKS.glob(kind))
        ]
        return {str(path): str(target / path.relative_to(NOTEBOOKS)) for path in files}

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *self.copies().values()]

    def get_source_files(self) -> list[str]:
        """Return what a source distribution needs, too."""
        return [
            *super().get_source_files(),
            *(str(path.relative_to(NOTEBOOKS.parent)) for path in map(Path, self.copies())),
        ]


setup(cmdclass={"build_py": BuildWithNotebooks})
