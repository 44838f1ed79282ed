"""How sharp a picture is. Without torch."""

import numpy as np
from PIL import Image
from scipy import ndimage


def laplacian_variance(image: Image.Image) -> float:
    """Return the variance of the Laplacian of the brightness (0..255): low for a blurred picture, 0 for an even one."""
    return float(ndimage.laplace(np.asarray(image.convert("L"), np.float32)).var())
