"""``python -m tde_kernels`` prints :func:`tde_kernels.info`."""

from tde_kernels import info

print(info())
