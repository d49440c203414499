"""Slides that tests write on the spot."""

import os
import signal

import numpy as np
import tifffile


def picture(h=512, w=512, glass=0, seed=0):
    """Draw pink and purple blobs [h, w, 3]; the left `glass` columns are white."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 2, (h // 16 + 1, w // 16 + 1))
    coarse = np.kron(coarse, np.ones((16, 16), int))[:h, :w, None]
    image = np.where(coarse, (225, 140, 190), (110, 70, 150)) + rng.integers(-20, 20, (h, w, 1))
    image[:, :glass] = 245
    return image.clip(0, 255).astype(np.uint8)


IMAGE = picture(600, 896)
TILES = dict(photometric="rgb", tile=(256, 256), compression="deflate", metadata=None)
APERIO = "Aperio Image Library v12\r\n512x512|AppMag = 40|MPP = "


def per_cm(x, y=None):
    return dict(resolution=(x, y or x), resolutionunit="CENTIMETER")


def half(image, k):
    """Average k x k pixels."""
    image = image[: len(image) // k * k, : image.shape[1] // k * k].astype(float)
    image = image.reshape(len(image) // k, k, -1, k, 3)
    return image.mean((1, 3)).round().astype(np.uint8)


def padded(image, tile=256):
    bottom = -len(image) % tile
    right = -image.shape[1] % tile
    return np.pad(image, ((0, bottom), (0, right), (0, 0)), constant_values=255)


def write(path, image, downs=(), tile=(256, 256), mpp=0.25, text=None, **options):
    """Write a pyramidal TIFF whose levels are exact averages; lossless unless options say else."""
    text = APERIO + str(mpp) if text is None else text
    options = TILES | dict(tile=tile, description=text) | options
    if tile is None:
        del options["tile"]
        options["rowsperstrip"] = 48
    with tifffile.TiffWriter(path) as tif:
        tif.write(image, **options)
        # The thumbnail of Aperio follows its level 0, in strips.
        tif.write(image[::8, ::8], photometric="rgb", description="Aperio - ", metadata=None)
        for d in downs:
            tif.write(half(image, d), **options | dict(description="Aperio", subfiletype=1))
    return path


def slides_in(folder, n=3):
    folder.mkdir()
    for i in range(n):
        write(folder / f"s{i}.svs", picture(512, 512, seed=i))
    return folder


SMALL = dict(patch_px=8, fov_px=32)


def die_below_zero(job):
    """Return the job, or kill this process, as a system without memory does."""
    if job < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return job
