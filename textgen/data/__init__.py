"""Text to batches: documents, corpus, token store, lanes and windows.

- `sources`: the files that paths, folders and globs name, and their splits
- `documents`: the documents of txt, jsonl, csv and parquet files
- `corpus`: where documents come from, which are dropped, how they are split
- `memory`: documents of a program as a corpus
- `store`: the encoded corpus on disk
- `lanes`: epochs as lanes and windows; the loader
- `texts`: texts to score
"""
