"""Speech: manifests, decoding, views, augmentation, loading."""
