"""Exchange of caches: HDF5 files, WebDataset tars, remote copies, and merging."""
