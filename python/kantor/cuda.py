"""Whether Kantor can run on NVIDIA GPUs here."""

from kantor import _C

__all__ = ["is_available"]


def is_available() -> bool:
    """Return True when this build has CUDA kernels and the driver offers a device. Never raises, needs no driver.

    Examples
    --------
    >>> import kantor
    >>> kantor.cuda.is_available() in (True, False)
    True
    """
    return bool(_C.cuda_device_count() > 0)
