"""Caches that travel: HDF5 files, WebDataset tars, copies elsewhere, and caches merged into one."""
