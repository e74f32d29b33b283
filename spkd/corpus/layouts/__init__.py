"""Layouts of corpora on disk: what the path of a file, or a list of the corpus, says of its utterance."""
