"""Text to batches: documents, corpus, token store, lanes and windows.

- `documents`: txt, jsonl, csv, parquet files and folders of them
- `corpus`: where documents come from, which are dropped, how they are split
- `store`: the encoded corpus on disk
- `lanes`: epochs as lanes and windows; the loader
- `texts`: texts to score
"""
