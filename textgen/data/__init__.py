"""Text to batches: documents, corpus, token store, lanes and windows.

- `sources`: the files that paths, folders and globs name, and their splits
- `documents`: the documents of txt, jsonl, json, csv and parquet files
- `csv_files`: those of csv and tsv files
- `json_files`: those of jsonl and json files
- `labels`: labels of documents: from columns and folders, and as numbers
- `rows`: the lines of files, and the check of a row's text
- `encodings`: a text file as a stream of UTF-8
- `decompression`: compressed files
- `cutting`: long documents in parts
- `tally`: the counts of reading, logged once
- `corpus`: where documents come from, which are dropped, how they are split
- `memory`: documents of a program as a corpus
- `mixture`: several sources as one corpus
- `store`: the encoded corpus on disk
- `split`: the documents of a split, mapped into memory
- `shards`: a train split in files that are read one after the other
- `plan`: which documents are kept, on disk for other processes
- `sharding`: preparing a store in shards, by any number of processes
- `remote`: the shards of a store at an address, in a cache on the local disk
- `lanes`: epochs as lanes and windows; the loader
- `mixed_lanes`: lanes of several sources
- `texts`: texts to score
- `side_by_side`: whole documents in batches of similar length, and in windows
"""
