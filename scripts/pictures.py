"""Copy the browser suite's screenshots that README and docs show: `make pictures` takes them first."""

from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
SHOTS, IMAGES = ROOT / "build" / "screenshots", ROOT / "docs" / "images"
PICTURES = {"rlvr": "panel", "samples": "samples", "checkpoints": "checkpoints"}  # screenshot → picture


def main() -> None:
    for shot, picture in PICTURES.items():
        for theme in ("light", "dark"):
            image = Image.open(SHOTS / f"{shot}-{theme}.png").convert("RGB")
            target = IMAGES / f"{picture}-{theme}.png"
            image.quantize(128, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
                target, "PNG", optimize=True
            )
            print(
                f"{target.relative_to(ROOT)}: {image.size[0]} × {image.size[1]}, {target.stat().st_size // 1000} kB"
            )


if __name__ == "__main__":
    main()
