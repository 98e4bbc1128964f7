"""Pictures as the bytes of files, and back: PNG with metadata, WebP, GIF and MP4."""

import io
import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from phosphene.errors import Unfinished
from phosphene.images.captions import PAPER
from phosphene.images.display import Picture

RATE = 25  # pictures a second of an MP4, which every player and slide program supports
MP4 = (  # colours by the standard for high definition, as the file then states; sides made even
    "-vf",
    "pad=ceil(iw/2)*2:ceil(ih/2)*2:color=white,scale=out_color_matrix=bt709:out_range=tv,format=yuv420p",
    *("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-movflags", "+faststart"),
)
CODECS = (("-c:v", "libx264", "-crf", "14"), ("-q:v", "2"))  # the second for an ffmpeg without libx264
LAST_FRAME = 1500  # milliseconds that it stays
METADATA = "phosphene"  # the PNG text entry that holds the metadata as JSON


def decode_image(content: bytes) -> Picture:
    """Return the picture in an image file's bytes, with its pixels loaded."""
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        return image


def webp(image: Picture, quality: int, effort: int = 4) -> bytes:
    """Return a picture as WebP bytes; equal input, equal bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=effort)
    return buffer.getvalue()


def png(image: Picture, metadata: Mapping[str, Any], effort: int = 6) -> bytes:
    """Return an image as PNG bytes with metadata, compressed with `effort` 1 to 9; equal input, equal bytes."""
    info = PngInfo()
    info.add_itxt(METADATA, json.dumps(metadata, sort_keys=True, ensure_ascii=False))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info, compress_level=effort)
    return buffer.getvalue()


def gif(frames: Sequence[Picture], milliseconds: int = 80) -> bytes:
    """Return frames as the bytes of a GIF that loops for ever and rests on the last one."""
    buffer = io.BytesIO()
    durations = [milliseconds] * (len(frames) - 1) + [LAST_FRAME]
    size = frames[-1].size
    scaled = [frame if frame.size == size else frame.resize(size, Image.Resampling.NEAREST) for frame in frames]
    # what Pillow would do takes 50 times as long, and looks no better
    scaled = [frame.quantize(256, Image.Quantize.FASTOCTREE) if frame.mode == "RGB" else frame for frame in scaled]
    scaled[0].save(buffer, "GIF", save_all=True, append_images=scaled[1:], duration=durations, loop=0)
    return buffer.getvalue()


def pad_to_same_size(frames: Sequence[Picture]) -> Iterator[Picture]:
    """Yield frames on white paper of one size."""
    size = (max(frame.width for frame in frames), max(frame.height for frame in frames))
    for frame in frames:
        page = frame if frame.size == size else Image.new("RGB", size, PAPER)
        if page is not frame:
            page.paste(frame, (0, 0))
        yield page


def mp4(frames: Sequence[Picture], milliseconds: int) -> bytes:
    """Return frames of one size as the bytes of an MP4 of 25 pictures a second, each repeated as long as it stays.

    Raises:
        Unfinished: ffmpeg failed.
    """
    width, height = frames[0].size
    raw_input = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(RATE), "-i", "-")
    message = ""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "film.mp4")
        for codec in CODECS:
            command = ["ffmpeg", "-v", "error", "-y", *raw_input, *MP4, *codec, str(target)]
            with tempfile.TemporaryFile() as errors:
                with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=errors) as process:
                    assert process.stdin is not None
                    try:
                        for index, frame in enumerate(frames):
                            duration = LAST_FRAME if index == len(frames) - 1 else milliseconds
                            for _ in range(duration * RATE // 1000):
                                process.stdin.write(frame.tobytes())
                        process.stdin.close()
                    except BrokenPipeError:
                        pass  # ffmpeg ended early, and stderr says why
                errors.seek(0)
                message = errors.read().decode(errors="replace").strip()
            if process.returncode == 0:
                return target.read_bytes()
    reason = message.splitlines()[-1] if message else "no reason given"
    raise Unfinished(f"ffmpeg could not make the film ({reason}); a .gif needs no ffmpeg")
