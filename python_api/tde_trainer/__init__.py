"""Reference trainer for `tde_kernels`: recipes in, tables and a report out. See ``tde --help``."""
