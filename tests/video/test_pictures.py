"""Pictures are upright and have the greys that a viewer shows, or one error names the file."""

import contextlib
import re
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("av")

from helpers.clips import numbers, picture, read_number

from vxl_model.inputs.images import PictureReader, open_frames
from vxl_model.inputs.processing import VideoXLProcessor
from vxl_model.video.pictures import ImageError, open_image, picture_files, picture_size
from vxl_model.video.reader import VideoError, VideoWarning, open_video

RAMP = np.linspace(0, 1, 256)[None].repeat(48, 0)


def wide(top, dtype):
    return np.rint(RAMP * top).astype(dtype)


def write_tiff(path, levels, bits, photometric=1):
    """A TIFF of one strip, for depths that Pillow does not write."""
    height, width = levels.shape
    if bits == 12:
        pairs = levels.reshape(-1, 2).astype(np.uint32)
        packed = (pairs[:, 0] << 12) | pairs[:, 1]
        data = b"".join(int(x).to_bytes(3, "big") for x in packed)
    else:
        data = levels.astype("<u2").tobytes()
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8)]
    tags += [(277, 1), (278, height), (279, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory)


def greys(folder):
    """Ramps from black to white in every depth and container that a library can write."""
    Image.fromarray(wide(255, np.uint8)).save(folder / "8.png")
    Image.fromarray(wide(65535, np.uint16)).save(folder / "16.png")
    Image.fromarray(wide(65535, np.uint16)).save(folder / "16.tif")
    Image.fromarray(wide(65535, np.uint16)).save(folder / "16.jp2", irreversible=False)
    (folder / "16.pgm").write_bytes(b"P5 256 48 65535\n" + wide(65535, ">u2").tobytes())
    (folder / "12.pgm").write_bytes(b"P5 256 48 4095\n" + wide(4095, ">u2").tobytes())
    write_tiff(folder / "12.tif", wide(4095, np.uint16), 12)
    write_tiff(folder / "white_is_zero.tif", 65535 - wide(65535, np.uint16), 16, photometric=0)
    Image.fromarray(RAMP.astype(np.float32)).save(folder / "float.tif")
    return sorted(folder.iterdir())


def test_greys_come_out_as_a_viewer_shows_them(tmp_path):
    for path in greys(tmp_path):
        shown = np.asarray(open_image(path))
        assert shown.shape == (48, 256, 3), path
        assert np.abs(shown[0, :, 0].astype(int) - np.arange(256)).max() <= 1, path


def test_greys_as_a_video(tmp_path):
    """The same as a video, or refused: FFmpeg does not open all of them."""
    read = []
    for path in greys(tmp_path):
        with contextlib.suppress(VideoError):
            read.append((path, next(iter(open_video(path, size=None)))[0]))
    assert len(read) >= 6
    for path, frame in read:
        assert np.abs(frame[0, :, 0].astype(int) - np.arange(256)).max() <= 1, path


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        (wide(65535, np.int32), "32-bit integers"),
        (wide(65535, np.float32), "floats from 0 to 65535"),
        (RAMP.astype(np.float32) - 0.5, "floats from -0.5 to 0.5"),
        (np.full((4, 4), np.nan, np.float32), "floats from nan to nan"),
    ],
)
def test_greys_of_unknown_range_are_refused(tmp_path, levels, words):
    path = tmp_path / "x.tif"
    Image.fromarray(levels).save(path)
    with pytest.raises(ImageError, match=rf"x\.tif: got {words}, expected"):
        open_image(path)
    with pytest.raises(VideoError, match=r"x\.tif"):
        open_video(path)
    with pytest.raises(ImageError, match=f"image: got {words}, expected"):
        open_image(Image.fromarray(levels))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "16.png"])
def test_exif_turns_and_mirrors(tmp_path, orientation, kind):
    """As a picture, and as a video, for which PyAV does not give the EXIF data."""
    upright = picture(0b1011, 96, 64)
    stored = upright  # as a camera stores it when it is held that way
    if orientation >= 5:
        stored = stored.transpose(1, 0, 2)
    if orientation in (3, 4, 6, 7):
        stored = stored[::-1]
    if orientation in (2, 3, 7, 8):
        stored = stored[:, ::-1]
    if kind == "16.png":
        stored = stored[..., 1].astype(np.uint16) * 257
    exif = Image.Exif()
    exif[274] = orientation
    exif[0x010F] = "a phone"
    path = tmp_path / f"x.{kind}"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    for shown in (np.asarray(open_image(path)), next(iter(open_video(path, size=None)))[0]):
        assert shown.shape == upright.shape
        assert read_number(shown) == 0b1011
        assert shown[:8, :, 0].mean() > (200 if kind != "16.png" else 30)


BROKEN = {
    "empty.png": b"",
    "text.png": b"This is not a picture.\n" * 50,
    "x.jp2": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(50),
    "x.tif": b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 200,
    "x.pcx": b"\x0a\x05\x01\x08" + b"\xff" * 130,
    "x.gif": b"GIF89a" + b"\xff" * 20,
    "x.fits": b"SIMPLE  =                    T" + b" " * 2850,
    "x.dds": b"DDS |\0\0\0" + b"\xff" * 124,
    "x.icns": b"icns" + b"\0\0\0\x20" + b"ic07" + b"\0\0\0\x09" + bytes(20),
    "x.psd": b"8BPS\0\x01" + b"\xff" * 60,
    "x.webp": b"RIFF\x20\0\0\0WEBPVP8 " + b"\xff" * 30,
}


@pytest.mark.filterwarnings("ignore")  # Pillow's own
@pytest.mark.parametrize("name", BROKEN)
def test_broken_pictures_are_named(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(BROKEN[name])
    words = rf"^{re.escape(str(path))}: not a picture that can be read \([^\n]*\)$"
    with pytest.raises(ImageError, match=words):
        open_image(path)
    with contextlib.suppress(ImageError):  # the header may be whole
        picture_size(path)


@pytest.mark.filterwarnings("ignore")
def test_every_byte_of_a_picture_may_be_wrong(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    rng = np.random.default_rng(1)
    read = 0
    for kind in ("png", "jpg", "tif", "gif", "bmp", "webp", "jp2", "ppm", "tga", "pcx", "sgi"):
        Image.fromarray(noise).save(tmp_path / f"whole.{kind}")
        data = (tmp_path / f"whole.{kind}").read_bytes()
        for trial in range(25):
            broken = bytearray(data[: len(data) if trial % 2 else int(rng.integers(len(data)))])
            for place in rng.integers(0, max(1, len(broken)), trial if broken else 0):
                broken[min(place, rng.integers(1, 200)) % len(broken)] = rng.integers(256)
            path = tmp_path / f"{trial}.{kind}"
            path.write_bytes(broken)
            for open_it in (open_image, picture_size):
                with contextlib.suppress(ImageError):
                    open_it(path)
                    read += 1
    assert read > 20


# -- pictures as a video ---------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for i in range(12):
        Image.fromarray(picture(i)).save(tmp_path / f"frame{i}.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    return tmp_path


def test_a_folder_of_pictures_in_the_order_of_their_numbers(folder):
    files = picture_files(folder)
    assert [file.stem for file in files] == [f"frame{i}" for i in range(12)]
    reader = PictureReader(folder, 64, batch=5)
    assert [len(batch) for batch in reader] == [5, 5, 2]
    assert numbers(reader) == list(range(12))
    assert numbers(PictureReader(folder, 64, frames=3)) == [0, 5, 11]
    with pytest.warns(VideoWarning, match="has 12 of the 50 frames asked for"):
        assert numbers(PictureReader(folder, 64, frames=50)) == list(range(12))
    (folder / "empty").mkdir()
    with pytest.raises(ImageError, match="empty: a folder without pictures"):
        PictureReader(folder / "empty", 64)
    (folder / "frame3.png").write_bytes(b"broken")
    with pytest.raises(ImageError, match=r"frame3\.png: not a picture"):
        list(PictureReader(folder, 64))


def test_names_with_and_without_numbers(tmp_path):
    names = [
        "a.png",
        "a1.png",
        "a1b.png",
        "a02.png",
        "a10.png",
        "b.png",
        "1.png",
        "10.png",
        "٢.png",
    ]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    ordered = [file.name for file in picture_files(tmp_path)]
    assert sorted(ordered) == sorted(names)
    assert [n for n in ordered if n.startswith("a")] == [
        "a.png",
        "a1.png",
        "a1b.png",
        "a02.png",
        "a10.png",
    ]


def videos(folder):
    """The same video of 4 frames, in all the ways in which it can be given."""
    paths = [folder / f"frame{i}.png" for i in range(4)]
    frames = np.stack([picture(i) for i in range(4)])
    only = folder / "only"
    only.mkdir()
    for path in paths:
        (only / path.name).write_bytes(path.read_bytes())
    fortran = np.asfortranarray(frames)
    backwards = np.ascontiguousarray(frames[::-1])[::-1]
    mirrored = np.ascontiguousarray(frames[:, :, ::-1])[:, :, ::-1]
    bgr = np.ascontiguousarray(frames[..., ::-1])[..., ::-1]
    frozen = frames.copy()
    frozen.flags.writeable = False
    return {
        "folder": only,
        "folder's name": str(only),
        "paths": paths,
        "PIL": [Image.fromarray(frame) for frame in frames],
        "arrays": tuple(frames),
        "negative strides": list(mirrored),
        "array": frames,
        "Fortran order": fortran,
        "backwards": backwards,
        "BGR turned": bgr,
        "read only": frozen,
        "tensor": torch.from_numpy(frames),
        "batches": [frames[:3], frames[3:]],
        "generator": (frames[i : i + 1] for i in range(4)),
    }


def test_whatever_a_user_calls_a_video(folder):
    processor = VideoXLProcessor(size=64)
    want = processor.frames_to_pixels(np.stack([picture(i) for i in range(4)]))
    for kind, video in videos(folder).items():
        batches, total = open_frames(video, 64)
        assert total == (None if kind == "generator" else 4), kind
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pixels = torch.cat([processor.frames_to_pixels(batch) for batch in batches])
        assert torch.equal(pixels, want), kind
    for one in (picture(2), Image.fromarray(picture(2))):
        assert torch.equal(torch.cat(list(processor.video_pixels(one))), want[2:3])


@pytest.mark.parametrize("kind", ["folder", "paths", "PIL"])
def test_some_of_the_pictures(folder, kind):
    batches, total = open_frames(videos(folder)[kind], 64, frames=2)
    assert (total, numbers(batches)) == (2, [0, 3])


def test_some_of_the_frames_of_an_array():
    frames = np.arange(5, dtype=np.uint8)[:, None, None, None].repeat(3, 3)
    batches, total = open_frames(np.broadcast_to(frames, (5, 4, 4, 3)), 4, frames=2)
    assert total == 2
    assert [int(frame[0, 0, 0]) for batch in batches for frame in batch] == [0, 4]


@pytest.mark.parametrize(
    ("video", "options", "words"),
    [
        ([], {}, "images: got none"),
        (np.zeros((2, 4, 4, 3), np.uint8), {"fps": 1}, "fps: got 1"),
        ([np.zeros((4, 4, 3), np.uint8)], {"fps": 1}, "fps: got 1"),
        ("https://example.com/a.mp4", {}, "https://example.com/a.mp4: a URL"),
        (Path("https://example.com/a.mp4"), {}, "a URL"),
        ("nowhere.mp4", {}, "nowhere.mp4: no such file"),
        (7, {}, "image: got int"),
        (None, {}, "image: got NoneType"),
        ([np.zeros((4, 4), np.uint8)], {}, "image: got uint8 of shape"),
        ([np.zeros((4, 4, 3), np.float32)], {}, "image: got float32"),
        ([torch.zeros(4, 4, 3, dtype=torch.bfloat16)], {}, "image: got torch.bfloat16"),
    ],
)
def test_other_inputs_are_refused(video, options, words):
    with pytest.raises(ValueError, match=words):
        list(open_frames(video, 64, **options)[0])
