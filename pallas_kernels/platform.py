"""For which platform a program is traced."""

import jax


def ambient() -> str:
    """One of "cpu", "gpu", "tpu": that of the ambient mesh's devices, which may be described only; without one, JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()
